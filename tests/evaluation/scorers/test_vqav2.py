"""VQAv2: yes/no, counts and colours."""

import pytest

from llava_cmoe.evaluation.scorers import Reference, get_scorer


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [("Yes", "yes", 1.0), ("2", "2", 1.0), ("2", "two", 0.0), ("no", "yes", 0.0), ("12", "1", 0.0), (" ", "no", 0.0)],
)
def test_one_reference_is_compared_exactly(text: str, answer: str, value: float) -> None:
    assert get_scorer("vqav2")(text, Reference(answer=answer)).value == value


def test_ten_references_are_compared_softly() -> None:
    reference = Reference(answer="red", answers=("red",) * 3 + ("dark red",) * 7)
    assert get_scorer("vqav2")("red", reference).value == 0.9
