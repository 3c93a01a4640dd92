"""GQA: one reference; the released script normalises the prediction only."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Yes.", "yes", 1.0),
        ("left", "Left", 1.0),
        ("to the left of", "to the left of", 1.0),
        ("yes, it is", "yes", 0.0),
        ("left", "right", 0.0),
        ("", "yes", 0.0),
        ("...", "yes", 0.0),
    ],
)
def test_both_sides_are_normalised_and_nothing_is_cut_out(text: str, answer: str, expected: float) -> None:
    assert value("gqa", text, Reference(answer=answer)) == expected
