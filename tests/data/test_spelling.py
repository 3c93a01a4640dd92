"""One spelling for texts that look alike, and the file on disk that a row spells otherwise."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.data.spelling import is_blank, other_spelling_on_disk, respell, spelled_out


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("\uff21\uff11\uff0e", "A1."),
        ("\uff76\uff9e", "\u30ac"),  # half-width katakana
        ("e\u200b\u0301", "\u00e9"),
        ("\u2018a\u2019 \u201cb\u201d \u300cc\u300d", '\'a\' "b" "c"'),
        ("wait\u2026", "wait..."),
        ("\u22125\u00a0\u2030", "-5 \u2030"),
        ("10\u00b2 \ufb01sh", "10\u00b2 \ufb01sh"),  # other compatibility forms stay
        ("a\u2014b", "a\u2014b"),
        ("line\nline", "line\nline"),
    ],
)
def test_texts_that_look_alike_get_one_spelling(text: str, spelled: str) -> None:
    assert respell(text) == spelled


@given(st.text(max_size=30))
def test_a_spelling_is_final_and_the_same_for_every_unicode_form(text: str) -> None:
    assert respell(respell(text)) == respell(text)
    assert respell(unicodedata.normalize("NFD", text)) == respell(text)


@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\ufeff \u2060", "\u3000"])
def test_what_shows_nothing_is_blank(text: str) -> None:
    assert is_blank(text) and not is_blank(text + "?")


def test_a_name_is_found_under_its_other_spelling(tmp_path: Path) -> None:
    there = tmp_path / unicodedata.normalize("NFD", "caf\u00e9") / "1.jpg"
    there.parent.mkdir()
    there.touch()
    asked = tmp_path / "caf\u00e9"
    if asked.exists():
        pytest.skip("this file system knows one form alone")
    assert other_spelling_on_disk(asked / "1.jpg") == there.parent
    assert other_spelling_on_disk(there) is other_spelling_on_disk(tmp_path / "tea") is None
    assert spelled_out(there.parent.name) == "cafe\\u0301"
