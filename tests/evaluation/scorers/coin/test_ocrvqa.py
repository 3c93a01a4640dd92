"""OCRVQA as released: equal in lower case, unless the prediction holds "Unanswerable"."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("mary O'Neil", "Mary O'Neil", 1.0),
        ("The Art of War", "Art of War", 0.0),
        ("Unanswerable Questions", "Unanswerable Questions", 0.0),
        ("unanswerable questions", "Unanswerable Questions", 1.0),
        ("", "", 1.0),
    ],
)
def test_a_title_with_the_capital_word_is_never_right(text: str, answer: str, expected: float) -> None:
    assert value("ocrvqa", text, Reference(answer=answer), "coin") == expected
