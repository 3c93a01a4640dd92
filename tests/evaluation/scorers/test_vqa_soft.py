"""The VQA accuracy over any number of annotators: TextVQA's table for ten, and the same rule for others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judging import value

from llava_cmoe.evaluation.scorers import Reference


def score(text: str, num_agreeing: int, num_annotators: int) -> float:
    answers = ("soup",) * num_agreeing + ("can",) * (num_annotators - num_agreeing)
    return value("vqa_soft", text, Reference(answers=answers))


@pytest.mark.parametrize(("count", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_annotators_give_the_table(count: int, expected: float) -> None:
    assert score("The soup.", count, 10) == expected


@given(st.integers(4, 30), st.data())
def test_the_score_is_the_mean_over_leaving_each_annotator_out(num_annotators: int, data: st.DataObject) -> None:
    agreeing = data.draw(st.integers(0, num_annotators))
    each = [min((agreeing - (place < agreeing)) / 3, 1) for place in range(num_annotators)]
    assert score("soup", agreeing, num_annotators) == pytest.approx(sum(each) / num_annotators)


def test_an_empty_answer_is_wrong_even_against_empty_ones() -> None:
    assert value("vqa_soft", " ", Reference(answers=("",) * 5)) == 0.0


@pytest.mark.parametrize("number", [0, 1, 3])
def test_too_few_annotators_are_an_error(number: int) -> None:
    with pytest.raises(ValueError, match=f"{number} annotators"):
        score("soup", number, number)
