"""GQA: one reference; the released script normalises the prediction only."""

import pytest

from llava_cmoe.evaluation.scorers import Reference, get_scorer


@pytest.mark.parametrize(
    ("text", "answer", "value"),
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
def test_both_sides_are_normalised_and_nothing_is_cut_out(text: str, answer: str, value: float) -> None:
    assert get_scorer("gqa")(text, Reference(answer=answer)).value == value
