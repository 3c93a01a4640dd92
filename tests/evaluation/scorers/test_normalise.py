"""The one normalisation: what it forgives, what it does not, and that it never loses an answer."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
