"""VizWiz and VQAv2 as released: equal in upper case, whatever ten annotators say."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference


@pytest.mark.parametrize("name", ["vizwiz", "vqav2"])
@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Unanswerable", "unanswerable", 1.0),
        ("yes.", "yes", 0.0),
        (" yes", "yes", 0.0),
        ("straße", "STRASSE", 1.0),
        ("", "", 1.0),
    ],
)
def test_only_case_is_forgiven(name: str, text: str, answer: str, expected: float) -> None:
    assert value(name, text, Reference(answer=answer, answers=("other",) * 10), "coin") == expected
