"""ScienceQA: the forms that name a letter, and the guesses of the released scripts that are not made here."""

import pytest

from llava_cmoe.evaluation.scorers import Reference
from llava_cmoe.evaluation.scorers.scienceqa import extract_letter, score

CHOICES = ("the cat", "a dog", "Neither")


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "B.",
        " B\n",
        "(B)",
        "B. a dog",
        "B. because it barks",
        "The answer is B",
        "The answer is B.",
        "a dog",
        "A Dog.",
    ],
)
def test_accepted_forms_name_the_letter(text: str) -> None:
    assert extract_letter(text, CHOICES) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "b",
        "It's B.",  # the released scripts read S
        "Don't know",  # the released scripts read T
        "B or C",
        "(B) a dog",
        "B) a dog",
        "Answer: B",
        "The answer is B because it barks",
        "the cat and a dog",
        "dogs",
    ],
)
def test_nothing_else_names_a_letter(text: str) -> None:
    assert extract_letter(text, CHOICES) is None


@pytest.mark.parametrize("text", ["D", "(E)", "E. none of them", "The answer is D"])
def test_a_letter_beyond_the_choices_is_wrong(text: str) -> None:
    assert extract_letter(text, CHOICES) is None


def test_an_option_that_reads_like_a_letter_beyond_the_choices_is_its_own_text() -> None:
    assert extract_letter("H", ("O", "H")) == "B"


def test_a_text_shared_by_two_options_names_neither() -> None:
    assert extract_letter("cat", ("cat", "The cat", "dog")) is None


def test_score_is_one_only_for_the_right_letter() -> None:
    reference = Reference(answer="B", choices=CHOICES)
    assert [score(text, reference).value for text in ("B", "C", "a dog", "the cat", "")] == [1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    "reference", [Reference(answer="D", choices=CHOICES), Reference(answer="A"), Reference("", (), (), CHOICES)]
)
def test_a_row_whose_answer_is_no_choice_is_an_error(reference: Reference) -> None:
    with pytest.raises(ValueError, match="choices"):
        score("A", reference)
