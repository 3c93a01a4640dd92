"""EvalAI's answer processor: what it does to answers, and what it looks as if it did."""

import pytest

from llava_cmoe.evaluation.scorers.coin.evalai import CONTRACTIONS, MARKS, process


@pytest.mark.parametrize(
    ("answer", "processed"),
    [
        ("The Red Car", "red car"),
        ("a an the", ""),
        ("none", "0"),
        ("Ten of ten", "10 of 10"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("what?", "what"),
        ("line\none\ttwo", "line 1 2"),
        ("  both  sides ", "both sides"),
        ("e.g.", "eg"),
        ("2.5", "2.5"),
        ("2.", "2"),
        (".5", ".5"),
        ("no.5", "no.5"),
        ("?,!", ""),
    ],
)
def test_case_numbers_articles_blanks_and_stops(answer: str, processed: str) -> None:
    assert process(answer) == processed


@pytest.mark.parametrize(
    ("answer", "processed"),
    [
        ("coca-cola", "coca cola"),
        ("coca - cola", "coca cola"),
        ("a-b - c", "ab c"),  # one blank beside any of them deletes all
        ("(left)", "left"),
        ("x=(y)", "x y"),
        ("50%", "50%"),
        ("$5:00", "$5:00"),
        ("wi-fi/lan", "wi fi lan"),
    ],
)
def test_a_mark_is_deleted_beside_a_blank_and_a_blank_elsewhere(answer: str, processed: str) -> None:
    assert process(answer) == processed


@pytest.mark.parametrize(
    ("answer", "processed"),
    [
        ("dont", "don't"),
        ("thats", "that's"),
        ("that's", "that 's"),  # the possessive goes first
        ("joe's", "joe 's"),
        ("Im", "im"),  # the table says "Im"
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("'ow'sat", "'ow 'sat"),
        ("ow'-s'at -", "'ow's'at"),  # whole again after the possessive was looked for
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("DONT", "don't"),
    ],
)
def test_contractions_are_restored_after_the_possessive_is_split_off(answer: str, processed: str) -> None:
    assert process(answer) == processed


def test_a_rule_for_thousands_never_applies() -> None:
    assert process("1,000-2") == "1000 2"  # with it, every mark would be deleted


def test_stops_go_up_to_the_thirty_second() -> None:
    assert process("." * 32) == ""
    assert process("." * 35) == "..."
    assert process(".5" * 40 + "." * 33) == ".5" * 40 + "."


def test_the_tables_have_the_size_of_the_standard_evaluation_without_what_never_matters() -> None:
    assert len(MARKS) == len(set(MARKS)) == 21
    assert len(CONTRACTIONS) == 120 - len(["Id've", "I'dve", "Im", "Ive", "let's", "she's"])
    assert all(word.replace("'", "") == restored.replace("'", "") for word, restored in CONTRACTIONS.items())
