"""TextVQA: the soft score over ten annotators, and answers that the EvalAI processor would have let through."""

import pytest

from llava_cmoe.evaluation.scorers import Reference
from llava_cmoe.evaluation.scorers.textvqa import score


def annotators(**counts: int) -> Reference:
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    return Reference(answers=tuple(answers + ["unanswerable"] * (10 - len(answers))))


@pytest.mark.parametrize(("count", "value"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_score_grows_with_the_number_of_agreeing_annotators_and_is_exact(count: int, value: float) -> None:
    assert score("Nokia.", annotators(nokia=count)).value == value


def test_spellings_that_normalise_alike_are_counted_together() -> None:
    assert score("the STOP", Reference(answers=("stop", "Stop", "stop.", "a stop") + ("go",) * 6)).value == 1.0


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_an_empty_answer_is_wrong_even_against_empty_references(empty: str) -> None:
    assert score(empty, Reference(answers=("",) * 10)).value == 0.0


@pytest.mark.parametrize("sign", ["a", "?", "the"])
def test_a_sign_of_one_article_or_mark_is_not_matched_by_another(sign: str) -> None:
    reference = Reference(answers=(sign,) * 10)
    assert score(sign, reference).value == 1.0
    assert score("", reference).value == score("an", reference).value == 0.0


def test_number_words_and_digits_are_different_answers() -> None:
    assert score("2", annotators(two=10)).value == 0.0


@pytest.mark.parametrize("num_answers", [0, 1, 9, 11])
def test_a_row_without_ten_answers_is_an_error(num_answers: int) -> None:
    with pytest.raises(ValueError, match=f"{num_answers} annotators"):
        score("stop", Reference(answer="stop", answers=("stop",) * num_answers))
