"""ScienceQA: the forms that name a letter, and the guesses of the released scripts that are not made here."""

import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llava_cmoe.evaluation.scorers import Reference
from llava_cmoe.evaluation.scorers.scienceqa import extract_letter, score

CHOICES = ("the cat", "a dog", "Neither")
WORDS = ("cat", "dog", "owl", "the ant", "a bee", "red fox", "elk", "yak", "gnu", "an emu")

OTHER_FORMS = (
    *("{}) {}", "({}) {}", "[{}] {}", "{{{}}} {}", "{}: {}", "{}; {}", "{}, {}", "{} - {}", "{}\u2014{}"),
    "{} \u2013 {}",
    *("{} ) {}", "{} : {}", "{} . {}", "'{}' {}", '"{}" {}', "\u201c{}\u201d {}", "{} ({})", '{} "{}"', "{}\uff09 {}"),
    *("{}\u200b) {}", "{}? {}", "{}! {}", "<{}> {}", "Answer: {} {}", "{} {} or so", "{}) {}.", "{}/{}", "{}| {}"),
)
"""Ways of naming a letter and a text that COIN's list of accepted forms does not hold."""
ACCEPTED_FORMS = ("{}", "{}.", "({})", "The answer is {}", "the answer is {}.", " {}\n", "\uff08{}\uff09", "\u200b{}")
letters = st.sampled_from(string.ascii_uppercase[: len(WORDS)])


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


@given(letters, letters, st.sampled_from(OTHER_FORMS), st.permutations(WORDS))
def test_no_other_form_names_anything_whatever_the_letter(letter: str, of: str, form: str, choices: list[str]) -> None:
    """An answer of "A) dog" was read as an article and the text of B, where "B) dog" was nothing."""
    text = choices[ord(of) - ord("A")]
    assert extract_letter(form.format(letter, text), tuple(choices)) is None


@given(letters, letters, st.sampled_from(string.punctuation + "\u2026\u3002\uff09 "), st.permutations(WORDS))
def test_a_letter_and_a_text_name_no_third_option(letter: str, of: str, mark: str, choices: list[str]) -> None:
    named = extract_letter(f"{letter}{mark} {choices[ord(of) - ord('A')]}", tuple(choices))
    assert named in (None, letter) or (letter == "A" and mark == " " and named == of)


@given(letters, letters, st.permutations([word for word in WORDS if " " not in word]))
def test_a_bare_capital_letter_before_a_text_names_no_other_option(letter: str, of: str, choices: list[str]) -> None:
    """A capital A may be the letter as well as the article."""
    assume(ord(of) - ord("A") < len(choices))
    named = extract_letter(f"{letter} {choices[ord(of) - ord('A')]}", tuple(choices))
    assert named == ("A" if letter == of == "A" else None)


@given(letters, st.sampled_from(ACCEPTED_FORMS), st.permutations(WORDS))
def test_every_accepted_form_names_its_letter(letter: str, form: str, choices: list[str]) -> None:
    assert extract_letter(form.format(letter), tuple(choices)) == letter


@given(letters, letters, st.permutations(WORDS))
def test_a_letter_with_a_stop_names_its_option_whatever_text_follows(letter: str, of: str, choices: list[str]) -> None:
    assert extract_letter(f"{letter}. {choices[ord(of) - ord('A')]}", tuple(choices)) == letter


@given(letters, st.sampled_from(["{}", "the {}", "The {}.", "a {}", "({})"]), st.permutations(WORDS))
def test_an_options_own_text_names_it_with_and_without_a_small_article(of: str, form: str, choices: list[str]) -> None:
    assert extract_letter(form.format(choices[ord(of) - ord("A")]), tuple(choices)) == of


def test_more_choices_than_letters_are_an_error() -> None:
    with pytest.raises(ValueError, match="27 choices, more than there are letters"):
        score("A", Reference(answer="A", choices=tuple(f"option {number}" for number in range(27))))
