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


@given(st.integers(2, 30), st.data())
def test_the_score_is_the_mean_over_leaving_each_annotator_out(num_annotators: int, data: st.DataObject) -> None:
    agreeing = data.draw(st.integers(0, num_annotators))
    enough = min(3, num_annotators - 1)
    each = [min((agreeing - (place < agreeing)) / enough, 1) for place in range(num_annotators)]
    assert score("soup", agreeing, num_annotators) == pytest.approx(sum(each) / num_annotators)


def test_an_empty_answer_is_wrong_even_against_empty_ones() -> None:
    assert value("vqa_soft", " ", Reference(answers=("",) * 5)) == 0.0


@given(st.integers(1, 30))
def test_what_everybody_says_is_fully_right_and_what_nobody_says_is_wrong(num_annotators: int) -> None:
    assert score("soup", num_annotators, num_annotators) == 1.0
    assert score("soup", 0, num_annotators) == 0.0


@pytest.mark.parametrize(("agreeing", "num_annotators"), [(1, 2), (1, 3), (2, 3), (1, 4), (3, 4)])
def test_up_to_four_annotators_count_alike(agreeing: int, num_annotators: int) -> None:
    assert score("soup", agreeing, num_annotators) == pytest.approx(agreeing / num_annotators)


def test_a_row_with_one_answer_and_no_list_is_judged_by_that() -> None:
    assert [value("vqa_soft", text, Reference(answer="soup")) for text in ("Soup.", "can", "")] == [1.0, 0.0, 0.0]
