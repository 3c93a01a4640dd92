"""What is recorded can be compared: by content, by key, whatever the order or the place."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cmoe.provenance.fingerprints import fingerprint_file, fingerprint_files
from llava_cmoe.registry.schema import differing_keys, plain_facts, recipe_facts
from llava_cmoe.settings.recipes import parse_recipe

KEYS = st.sampled_from("abc")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=6)
DOCUMENTS = st.dictionaries(KEYS, NESTED)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"1")
    (tmp_path / "a" / "b" / "two").write_bytes(b"22")
    return tmp_path / "a"


def test_fingerprint_depends_on_names_and_contents_alone(folder, tmp_path):
    paths = [folder / "one", folder / "b" / "two"]
    first = fingerprint_files(paths, root=folder)
    assert fingerprint_files(reversed(paths), root=folder) == first
    moved = folder.rename(tmp_path / "z")
    assert fingerprint_files([moved / "b" / "two", moved / "one"], root=moved) == first
    (moved / "one").write_bytes(b"2")
    second = fingerprint_files([moved / "one", moved / "b" / "two"], root=moved)
    (moved / "one").write_bytes(b"1")
    (moved / "one").rename(moved / "uno")
    third = fingerprint_files([moved / "uno", moved / "b" / "two"], root=moved)
    assert len({first, second, third, fingerprint_files([moved / "uno"], root=moved)}) == 4


def test_file_fingerprint_is_plain_sha256(folder):
    assert fingerprint_file(folder / "one") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"


@settings(max_examples=50, deadline=None)
@given(DOCUMENTS)
def test_plain_facts_are_a_fixed_point(document):
    assert plain_facts(document) == document and plain_facts(plain_facts(document)) == plain_facts(document)


@settings(max_examples=50, deadline=None)
@given(DOCUMENTS, DOCUMENTS)
def test_keys_differ_if_and_only_if_documents_do(began, now):
    assert list(differing_keys(began, copy.deepcopy(began))) == []
    assert bool(list(differing_keys(began, now))) == (began != now)
    assert len(list(differing_keys(began, now))) == len(list(differing_keys(now, began)))


def test_differing_keys_are_dotted_with_both_values():
    began, now = {"a": {"b": {"c": 1, "d": 2}}, "e": None}, {"a": {"b": {"c": 1, "d": 3}}}
    assert list(differing_keys(began, now)) == ["a.b.d (was 2, now 3)", "e (was None, now 'absent')"]


def test_recipe_facts_hold_every_setting_but_the_place(tmp_path):
    recipe = parse_recipe({"run": str(tmp_path), "method": {"name": "cmoe"}}, source="test")
    facts = recipe_facts(recipe)
    assert parse_recipe(facts | {"run": str(tmp_path)}, source="test") == recipe
    assert str(tmp_path) not in str(facts)
