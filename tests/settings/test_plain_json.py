"""JSON is read as Python reads it, but for what Python takes silently and nobody can use."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cmoe.settings.plain_json import PlainJsonError, parse_json

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50)
@given(documents)
def test_a_document_is_what_it_is(document: object) -> None:
    assert parse_json(json.dumps(document)) == document


@given(st.lists(st.sampled_from("abc"), min_size=2), st.sampled_from(["{}", "[{}]", '{{"x": {}}}']))
def test_a_key_that_occurs_twice_is_named_with_both_places(keys: list[str], around: str) -> None:
    text = around.format("{" + ", ".join(f'"{key}": {place}' for place, key in enumerate(keys)) + "}")
    if len(set(keys)) == len(keys):
        parse_json(text)
    else:
        second = next(place for place, key in enumerate(keys) if key in keys[:place])
        places = f"key '{keys[second]}' occurs twice .*entries {keys.index(keys[second])} and {second}"
        with pytest.raises(PlainJsonError, match=places):
            parse_json(text)


AROUND = st.sampled_from(["{}", "[1, {}]", '{{"x": [{}]}}'])


@given(AROUND, st.sampled_from(["NaN", "Infinity", "-Infinity", "9" * 4301, "-" + "1" * 5000, "[" * 9999]))
def test_numbers_and_nesting_have_an_end(around: str, written: str) -> None:
    with pytest.raises(PlainJsonError, match="no number of JSON|thousands of digits|nested too deep"):
        parse_json(around.format(written).encode())


@given(AROUND, st.text(max_size=3), st.integers(0xD800, 0xDFFF), st.text(max_size=3), st.booleans(), st.booleans())
def test_half_of_a_surrogate_pair_is_found(
    around: str, before: str, code: int, after: str, is_key: bool, escaped: bool
) -> None:
    half = before + chr(code) + after
    text = around.format(json.dumps({half: 1} if is_key else half, ensure_ascii=escaped))
    with pytest.raises(PlainJsonError, match="half of a surrogate pair in ") as raised:
        parse_json(text)
    assert str(raised.value).encode()


@given(AROUND, st.text(st.characters(min_codepoint=0x10000), min_size=1))
def test_a_whole_pair_is_a_character(around: str, text: str) -> None:
    assert text in repr(parse_json(around.format(json.dumps(text)))) or not text.isprintable()


@given(depth=st.integers(1, 400))
def test_a_place_is_named_at_a_readable_length_however_deep_it_is(depth: int):
    with pytest.raises(PlainJsonError) as raised:
        parse_json("[" * depth + '"\\ud800"' + "]" * depth)
    assert str(raised.value).startswith("half of a surrogate pair in [0]") and len(str(raised.value)) < 200
