"""VizWiz: soft where the ten answers are at hand, exact against the one answer of CoIN's file otherwise."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference


def test_unanswerable_counts_like_any_answer() -> None:
    assert value("vizwiz", "Unanswerable", Reference(answer="unanswerable")) == 1.0
    assert value("vizwiz", "unanswerable", Reference(answer="soup")) == 0.0


def test_ten_answers_give_the_soft_score_and_the_one_answer_is_not_looked_at() -> None:
    reference = Reference(answer="can", answers=("soup",) * 2 + ("can of soup",) * 8)
    assert [value("vizwiz", text, reference) for text in ("soup", "can of soup", "can")] == [0.6, 1.0, 0.0]


def test_a_row_with_some_but_not_ten_answers_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 annotators"):
        value("vizwiz", "soup", Reference(answer="soup", answers=("soup",) * 3))
