"""VQAv2: yes/no, counts and colours."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [("Yes", "yes", 1.0), ("2", "2", 1.0), ("2", "two", 0.0), ("no", "yes", 0.0), ("12", "1", 0.0), (" ", "no", 0.0)],
)
def test_one_reference_is_compared_exactly(text: str, answer: str, expected: float) -> None:
    assert value("vqav2", text, Reference(answer=answer)) == expected


def test_ten_references_are_compared_softly() -> None:
    reference = Reference(answer="red", answers=("red",) * 3 + ("dark red",) * 7)
    assert value("vqav2", "red", reference) == 0.9
