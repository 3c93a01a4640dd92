"""What stands beside tensors is believed only as it was written: any value that was changed since is found."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import refused, type_in
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import Lesson

from llava_cmoe.merging.store import BeforeAfter, MergeRecord
from llava_cmoe.provenance.invocations import bind_results
from llava_cmoe.registry.schema import RegistryError, RunRecord, Sealed, Sources, recipe_facts, warn_once
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.recipes import parse_recipe

RECIPE = recipe_facts(parse_recipe({"run": "r", "method": {"name": "cmoe"}}, source="test"))
PAIR = BeforeAfter(before=1.5, after=2.0)
FILES: dict[str, Sealed] = {
    "run.json": RunRecord(recipe=RECIPE, sources=Sources(data_files={"a": "1"}, backbone_fingerprint="2")).sealed(),
    "merge.json": MergeRecord(
        parent="p", bound=0.1, stand_ins={"l": (0, 0)}, shares={"l": (0.5, 0.5)}, held_out={"t": 3}, loss={"t": PAIR},
        accuracy={"t": PAIR}, expert_bytes=PAIR, versions={"torch": "1"},
    ).sealed(),
}  # fmt: skip


def leaves(document: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a document stand."""
    keys = document.keys() if isinstance(document, dict) else range(len(document))
    for key in keys:
        inner = isinstance(document[key], (dict, list)) and document[key]
        yield from leaves(document[key], (*place, key)) if inner else [(*place, key)]


def changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    document = copy.deepcopy(document)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return document


def means(record: Sealed, document: Any) -> bool:
    """Whether a document is read as this record, as with `true` for 1."""
    try:
        return type(record).model_validate(document).to_json() == record.to_json()
    except ValidationError:
        return False


OTHER = st.none() | st.booleans() | st.integers(-9, 999) | st.floats(-9, 9) | st.text(max_size=5)


@given(st.data())
def test_any_value_that_is_changed_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(FILES)))
    written = json.loads(FILES[name].to_json())
    place = data.draw(st.sampled_from(list(leaves(written))))
    edited = changed(written, place, data.draw(OTHER))
    path = tmp_path_factory.mktemp("sealed") / name
    path.write_text(json.dumps(written))
    assert type(FILES[name]).read(path) == FILES[name]
    path.write_text(json.dumps(edited))
    if not means(FILES[name], edited) and place != ("sha256",):
        with pytest.raises(RegistryError, match=name) as raised:
            type(FILES[name]).read(path)
        assert "\n" not in str(raised.value)


def test_a_hash_outlives_a_key_that_comes_to_be(tmp_path: Path):
    class Younger(RunRecord):
        since: int = 0

    (tmp_path / "run.json").write_text(FILES["run.json"].to_json())
    assert Younger.read(tmp_path / "run.json").since == 0


@pytest.fixture
def run(lesson_of: Callable[[str], Lesson], tmp_path: Path) -> Path:
    return Path(shutil.copytree(lesson_of("cmoe").recipe.run, tmp_path / "run"))


def edit(path: Path, place: tuple[Any, ...], value: Any, hashed: bool = True) -> None:
    document = changed(json.loads(path.read_text()), place, value)
    if not hashed:
        del document["sha256"]
    path.write_text(json.dumps(document))


EDITS = {
    ("recipe", "method", "experts", "alpha"): 320.0,
    ("recipe", "method", "locator", "layer"): 0,
    ("recipe", "backbone", "dtype"): "bfloat16",
    ("recipe", "data", "tasks"): ["sides", "colours"],
    ("recipe", "seed"): 7,
}


@pytest.mark.parametrize("place", EDITS, ids=lambda place: place[-1])
def test_an_edited_recipe_is_refused_with_and_without_its_hash(run: Path, place: tuple[str, ...]):
    whole = (run / "run.json").read_bytes()
    for hashed, why in ((True, "was changed after it was written"), (False, "says another recipe than sides was")):
        (run / "run.json").write_bytes(whole)
        edit(run / "run.json", place, EDITS[place], hashed)
        for command in (("eval", run), ("chat", run, "--prompt", "x"), ("merge", run), ("probe", run)):
            told = refused(*command)
            assert why in told and "run.json" in told.splitlines()[-1]


def test_a_run_that_is_older_than_the_hashes_loads_and_is_said_not_to_be_verified(
    run: Path, caplog: pytest.LogCaptureFixture
):
    edit(run / "run.json", ("processes",), 1, hashed=False)
    (run / "manifest.json").unlink()
    assert Registry(run).recipe() and type_in("report", run).exit_code == 0
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in said if "not verified" in message] == [
        str(run / name) for name in ("run.json", "results.json")
    ]
    Registry(run, writer=True).open_run(Registry(run).recipe())
    caplog.clear()
    warn_once.cache_clear()
    assert Registry(run).recipe() and not caplog.records


@pytest.mark.parametrize("accuracy", [9999.0, 0.0, None])
def test_edited_results_are_refused_and_scored_again(run: Path, tmp_path: Path, accuracy: float | None):
    before = (run / "results.json").read_bytes()
    edit(run / "results.json", ("routes", "located", "matrix", 0, 0), accuracy)
    for command in (("report", run), ("answers", "export", run, "--to", tmp_path / "out")):
        told = refused(*command)
        assert f"llava-cmoe rescore {run}" in told and "results.json" in told
    again = type_in("rescore", run)
    assert again.exit_code == 0 and (run / "results.json").read_bytes() == before
    assert type_in("report", run).exit_code == 0


def test_results_of_answers_that_came_in_are_bound_too(run: Path):
    for name in ("manifest.json", "run.json"):
        (run / name).unlink()
    bind_results(run)
    edit(run / "results.json", ("seed",), 3)
    assert "was changed after it was written" in refused("report", run)


def doubled(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[: at + 1], *lines[at:]]


DAMAGE: dict[str, Callable[[list[bytes], int], list[bytes]]] = {
    "a letter": lambda lines, at: [*lines[:at], lines[at].replace(b'"text": "', b'"text": "x'), *lines[at + 1 :]],
    "a verdict": lambda lines, at: [*lines[:at], lines[at].replace(b'"score": ', b'"score": 1'), *lines[at + 1 :]],
    "a cut line": lambda lines, at: [*lines[:at], lines[at][: len(lines[at]) // 2]],
    "a row less": lambda lines, at: [*lines[:at], *lines[at + 1 :]],
    "a row twice": doubled,
    "another order": lambda lines, at: [*lines[at + 1 :], *lines[: at + 1]],
    "blanks": lambda lines, at: [*lines[:at], b" " + lines[at], *lines[at + 1 :]],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_answers_that_were_changed_are_named_by_whatever_reads_them(run: Path, kind: str):
    paths = sorted((run / "answers").rglob("*.located.jsonl"))
    number = sorted(DAMAGE).index(kind)
    path = paths[number % len(paths)]
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(DAMAGE[kind](lines, number % (len(lines) - 1))))
    for command in (("report", run), ("answers", "export", run, "--to", run / "out")):
        told = refused(*command)
        assert told.count("\n") == 1 and f"{path}: was changed after it was answered" in told
    again = type_in("rescore", run)
    assert str(path) in again.output and again.exit_code in (0, 2)
    path.write_bytes(whole)
    assert type_in("rescore", run).exit_code == 0 and type_in("report", run).exit_code == 0


def test_changed_answers_are_not_taken_for_given_by_what_asks(run: Path):
    path, other = run / "answers/after_01/colours.oracle.jsonl", run / "answers/after_02/sides.oracle.jsonl"
    whole = {one: one.read_bytes() for one in (path, other)}
    path.write_bytes(whole[path].replace(b'"text": "', b'"text": "x', 1))
    assert f"{path}: was changed" in refused("eval", run)
    path.unlink()
    other.unlink()
    assert type_in("eval", run).exit_code == 0  # asked again
    assert {one: one.read_bytes() for one in whole} == whole


def test_any_value_of_a_manifest_that_is_changed_is_found(run: Path):
    path = run / "manifest.json"
    written = json.loads(path.read_text())
    for place in list(leaves(written))[::3]:
        path.write_text(json.dumps(changed(written, place, "other")))
        assert "manifest.json" in refused("report", run)
    path.write_text(
        json.dumps({key: written[key] for key in ("results_sha256", "calls")})
    )  # as older versions wrote it
    assert type_in("report", run).exit_code == 0


@pytest.mark.parametrize("tasks", [["colours", "x"], ["sides", "colours"], ["colours"], ["colours", "sides", "more"]])
def test_results_of_other_tasks_than_the_data_has_are_told_and_not_drawn(run: Path, tmp_path: Path, tasks: list[str]):
    edit(run / "results.json", ("tasks",), tasks)
    bind_results(run)
    why = "is of the tasks" if len(tasks) == 2 else f"is not of {len(tasks)} tasks"
    assert why in refused("answers", "export", run, "--to", tmp_path / "out")
    told = type_in("report", run, "--out", tmp_path / "report")
    assert isinstance(told.exception, SystemExit | None) and "Traceback" not in told.output
    assert why in told.output and told.exit_code == (0 if len(tasks) == 2 else 2)
