"""TextVQA as released: the ten annotators' soft score on processed answers, empty ones included."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference
from llava_cmoe.evaluation.scorers.coin.textvqa import soft_score


def score(text: str, *answers: str) -> float:
    return value("textvqa", text, Reference(answers=answers + ("other",) * (10 - len(answers))), "coin")


@pytest.mark.parametrize(("count", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_score_grows_with_the_number_of_agreeing_annotators(count: int, expected: float) -> None:
    assert score("Nokia", *("nokia",) * count) == expected


def test_both_sides_are_processed() -> None:
    assert score("the two", "2", "Two", "a 2", "2?") == 1.0
    assert score("dont walk", "don't walk") == 0.3


@pytest.mark.parametrize("empty", ["", "the", "?", "-", "."])
def test_an_empty_answer_earns_the_share_of_references_that_become_empty(empty: str) -> None:
    assert score(empty, "a", "!") == 0.6
    assert score(empty, "x") == 0.0


@pytest.mark.parametrize("number", [0, 9, 11])
def test_other_than_ten_answers_are_an_error(number: int) -> None:
    with pytest.raises(ValueError, match=f"{number} annotators"):
        soft_score("x", ["x"] * number)
