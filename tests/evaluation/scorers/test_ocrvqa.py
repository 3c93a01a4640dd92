"""OCRVQA: titles and authors; the released script calls any answer that holds "Unanswerable" wrong."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The Art of War", "Art of War", 1.0),
        ("mary o'neil", "Mary O'Neil", 1.0),
        ("Mary", "Mary O'Neil", 0.0),
        ("Mary O\u2019Neil", "Mary O'Neil", 1.0),
        ("A. Moss", "Moss", 0.0),  # an initial is no article, as it is under EvalAI's rule
        ("Moss", "A. Moss", 0.0),
        ("Vitamin A", "Vitamin", 0.0),
        ("Unanswerable Questions", "Unanswerable Questions", 1.0),
        ("Unanswerable", "Science & Math", 0.0),
        ("", "Science & Math", 0.0),
    ],
)
def test_the_whole_title_or_name_is_compared(text: str, answer: str, expected: float) -> None:
    assert value("ocrvqa", text, Reference(answer=answer)) == expected
