"""No name that a file brings along leads out of the folder that it is used in."""

import os
from pathlib import Path

import pytest
from cells import FACTS
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llava_cmoe.data.tasks import Source, TaskSpec
from llava_cmoe.evaluation.log import RunFacts
from llava_cmoe.registry.schema import FileRecord, TaskRecord
from llava_cmoe.settings.names import inner_path, plain_name

PARTS = st.sampled_from(["..", ".", "", "x", "C:", "a b", "ü", "[/b]", "\x1b[2J", "\0", "\n", "\ud800", "n" * 300])
PATHS = st.builds(lambda parts, mark: mark.join(parts), st.lists(PARTS, min_size=1, max_size=5), st.sampled_from("/\\"))
RECORD = {"index": 0, "name": "a", "method": "cmoe", "settings": {}, "parent": None, "versions": {}, "facts": {}}
RECORD |= {"data_fingerprint": "", "backbone_fingerprint": "", "seconds": {}}
TASK = {"name": "a", "train": "t", "evaluate": "e", "scorer": "gqa", "max_new_tokens": 1}


def is_taken(function, *args, **kwargs) -> bool:
    try:
        function(*args, **kwargs)
    except (ValueError, ValidationError):
        return False
    return True


@given(PATHS)
def test_what_is_taken_as_a_name_or_path_lies_in_the_folder(text: str):
    for check in (plain_name, inner_path):
        if is_taken(check, text):
            place = os.path.normpath(os.path.join("/folder", text))
            assert place == "/folder" or place.startswith("/folder/")
            assert text.isprintable() and isinstance(os.fsencode(text), bytes)  # raises for half of a pair
            assert check is inner_path or os.path.dirname(place) in ("/folder", "/")


@given(PATHS)
def test_every_name_and_path_in_a_file_is_held_to_that(text: str):
    name, path = is_taken(plain_name, text), is_taken(inner_path, text)
    assert is_taken(RunFacts, **FACTS.model_dump() | {"run": text}) == name
    files = {f"{text}.safetensors": FileRecord(sha256="", bytes=0)}
    assert is_taken(TaskRecord, **RECORD, files=files) == is_taken(plain_name, f"{text}.safetensors")
    assert is_taken(Source, name="s", holds="h", to=text) == path
    for key in ("train", "evaluate", "annotations", "folder", "images", "evaluate_images"):
        assert is_taken(TaskSpec, **TASK | {key: text}) == path


@pytest.mark.parametrize("name", ["pocket_cmoe", "a b", "ü", "run [1]", "..x", "x.."])
def test_plain_names_are_taken(name: str):
    assert plain_name(name) == name and inner_path(name) == name


def test_a_record_of_another_file_is_refused():
    with pytest.raises(ValidationError, match="no .safetensors file"):
        TaskRecord(**RECORD, files={"run.json": FileRecord(sha256="", bytes=0)})


def test_paths_below_a_folder_are_taken():
    assert inner_path("ScienceQA/train.json") == "ScienceQA/train.json" and Path(inner_path(".")) == Path()
