"""ScienceQA as released: which letter a prediction is read as."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference
from llava_cmoe.evaluation.scorers.coin.scienceqa import letter


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("B", "B"),
        ("B. a dog", "B"),
        ("B.", "B"),
        ("(b)", "B"),
        ("b", "B"),
        ("The answer is C", "C"),
        ("a dog, or B", "A"),  # the article stands alone first
        ("A. ", "A"),
        ("A.x then D", "A"),
        ("It's B.", None),  # S
        ("Don't know", None),  # T
        ("é or B", None),  # any letter of Unicode
        ("7 or B", None),
        ("_ or B", None),
        ("dog", None),
        ("", None),
        ("E", "E"),
        ("F", None),
    ],
)
def test_the_first_letter_that_can_be_found_is_read(text: str, read: str | None) -> None:
    assert letter(text, 5) == read


def test_a_letter_beyond_the_choices_is_none_and_the_next_one_is_not_looked_for() -> None:
    assert letter("C", 3) == "C"
    assert letter("C", 2) is letter("C or A", 2) is None


def test_a_runs_answer_is_right_if_its_letter_is() -> None:
    reference = Reference(answer="B", choices=("x", "y"))
    assert [value("scienceqa", text, reference, "coin") for text in ("B", "it is b", "y", "")] == [1, 1, 0, 0]


def test_a_sixth_option_is_never_right() -> None:
    assert value("scienceqa", "F", Reference(answer="F", choices=("x",) * 6), "coin") == 0
