"""GQA as released: only the prediction is prepared."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Yes", "yes", 1.0),
        ("yes...", "yes", 1.0),
        ("yes. ", "yes", 0.0),
        (" yes", "yes", 0.0),
        ("the left", "left", 0.0),
        ("Left", "Left", 0.0),  # no answer with a capital is ever met
        ("st.", "st.", 0.0),
        ("...", "", 1.0),
    ],
)
def test_case_and_stops_at_the_end_of_the_prediction_do_not_count(text: str, answer: str, expected: float) -> None:
    assert value("gqa", text, Reference(answer=answer), "coin") == expected
