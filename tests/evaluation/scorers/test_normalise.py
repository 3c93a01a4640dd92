"""The one normalisation: what it forgives, what it does not, and that it never loses an answer."""

import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_cmoe.data.spelling import is_blank
from llava_cmoe.evaluation.scorers.normalise import normalise

# A busy machine is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Yes", "yes."),
        ("the red car", "red car"),
        ("  red   car\n", "red car"),
        ('"stop"', "STOP!"),
        ("(left)", "left"),
        ("on the table", "on table"),
        ("Straße", "strasse"),
        ("the stop sign", "stop sign"),
        ("(the cat)", "cat"),
        ("a the cat", "cat"),
        ("Mary O\u2019Neil", "mary o'neil"),
        ("\u201cstop\u201d", "stop"),
        ("wait\u2026", "wait"),
        ("cafe\u0301", "caf\u00e9"),
        ("\uff33\uff34\uff2f\uff30\uff01", "stop"),
        ("st\u200bop\ufeff", "stop"),
        ("coca\u2011cola", "coca-cola"),
        ("a\u00a0red\u2009car", "red car"),
        ("\u22125", "-5"),
    ],
)
def test_case_outer_punctuation_articles_and_blanks_do_not_matter(left: str, right: str) -> None:
    assert normalise(left) == normalise(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("two", "2"),
        ("none", "0"),
        ("-5", "5"),
        ("$5", "5"),
        ("50%", "50"),
        (".5", "5"),
        ("coca-cola", "coca cola"),
        ("1,000", "1000"),
        ("don't", "dont"),
        ("a", "the"),
        ("anchor", "chor"),
        ("A. Moss", "Moss"),  # EvalAI's rule would drop the initial
        ("A) dog", "dog"),
        ("A, dog", "dog"),
        ("A (dog)", "dog"),
        ("vitamin A", "vitamin"),
        ("The-A-team", "team"),
        ("10\u00b2", "102"),  # no compatibility forms
    ],
)
def test_nothing_else_is_forgiven(left: str, right: str) -> None:
    assert normalise(left) != normalise(right)


@pytest.mark.parametrize(("text", "kept"), [("A", "a"), ("the", "the"), ("?", "?"), ("a.", "a"), ("The A", "the a")])
def test_a_rule_that_would_leave_nothing_is_not_applied(text: str, kept: str) -> None:
    assert normalise(text) == kept


@UNHURRIED
@given(st.text(alphabet="aA bT.he\"'(),?5-\n", max_size=20))
def test_normalising_twice_changes_nothing_and_only_blanks_become_empty(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert (once == "") == (text.strip() == "")


@UNHURRIED
@given(st.text(max_size=20))
def test_so_it_is_for_any_text(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert (once == "") == is_blank(text)


@UNHURRIED
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20))
def test_composed_and_decomposed_texts_are_the_same_answer(text: str) -> None:
    assert normalise(unicodedata.normalize("NFD", text)) == normalise(unicodedata.normalize("NFC", text))


INVISIBLE = ("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u200e", "\u200f")


@UNHURRIED
@given(
    st.text("aB1 .,'-", max_size=12), st.lists(st.tuples(st.integers(0, 12), st.sampled_from(INVISIBLE)), max_size=4)
)
def test_what_has_no_width_changes_no_answer(text: str, signs: list[tuple[int, str]]) -> None:
    longer = text
    for place, sign in signs:
        longer = longer[:place] + sign + longer[place:]
    assert normalise(longer) == normalise(text)


@UNHURRIED
@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=12))
def test_full_width_signs_are_the_usual_ones(text: str) -> None:
    assert normalise("".join(chr(ord(sign) + 0xFEE0) for sign in text)) == normalise(text)


@UNHURRIED
@given(
    st.sampled_from(["a", "an", "the", "A", "The"]),
    st.sampled_from(list(".,:;!?)]}>'\"-/|*")),
    st.sampled_from(["Moss", "dog", "5"]),
)
def test_an_article_with_a_mark_is_kept(article: str, mark: str, word: str) -> None:
    for text in (f"{article}{mark} {word}", f"{article} {mark} {word}", f"{article} {mark}{word}"):
        assert normalise(text) != normalise(word)
