"""TextVQA as released: the ten annotators' soft score on processed answers, empty ones included."""

from collections.abc import Sequence

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference
from llava_cmoe.evaluation.scorers.coin.textvqa import soft_score


def score(text: str, *answers: str) -> float:
    return value("textvqa", text, Reference(answers=answers + ("other",) * (10 - len(answers))), "coin")


@pytest.mark.parametrize(("count", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_score_grows_with_the_number_of_agreeing_annotators(count: int, expected: float) -> None:
    assert score("Nokia", *("nokia",) * count) == pytest.approx(expected)


@pytest.mark.parametrize("places", [(), (0,), (8, 9), (0, 9), (0, 1, 2), (7, 8, 9), (1, 4, 5, 6), range(10)])
def test_a_score_is_summed_annotator_by_annotator_to_the_last_bit(places: Sequence[int]) -> None:
    """Rounding a percentage hangs on it: two last annotators are worth a little less than two first ones."""
    answers = ["nokia" if place in places else f"other {place}" for place in range(10)]
    shares = []
    for left_out in range(10):
        others = [answer for place, answer in enumerate(answers) if place != left_out]
        shares.append(min(1, float(others.count("nokia")) / 3))
    assert score("nokia", *answers) == (sum(shares) / len(shares) if places else 0.0)


def test_both_sides_are_processed() -> None:
    assert score("the two", "2", "Two", "a 2", "2?") == 1.0
    assert score("dont walk", "don't walk") == pytest.approx(0.3)


@pytest.mark.parametrize("empty", ["", "the", "?", "-", "."])
def test_an_empty_answer_earns_the_share_of_references_that_become_empty(empty: str) -> None:
    assert score(empty, "a", "!") == pytest.approx(0.6)
    assert score(empty, "x") == 0.0


@pytest.mark.parametrize("number", [0, 9, 11])
def test_other_than_ten_answers_are_an_error(number: int) -> None:
    with pytest.raises(ValueError, match=f"{number} annotators"):
        soft_score("x", ["x"] * number)
