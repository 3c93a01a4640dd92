"""JSON is read as Python reads it, but for an object that has a key twice."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.data.strict_json import DoubledKey, parse_json

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


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
        with pytest.raises(DoubledKey, match=places):
            parse_json(text)
