"""A repetition is the run, bit for bit, and what differs is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Lesson

from llava_cmoe.analyses.reproduction import differences, reproduce
from llava_cmoe.provenance.invocations import bind_results
from llava_cmoe.registry.schema import RegistryError


def test_a_run_is_reproduced(lesson_of: Callable[..., Lesson], tmp_path: Path):
    found = reproduce(lesson_of("sequential_lora").recipe.run, tmp_path / "again")
    assert found.same


def test_what_differs_is_named(lesson_of: Callable[..., Lesson], tmp_path: Path):
    run = lesson_of("sequential_lora").recipe.run
    again = Path(shutil.copytree(run, tmp_path / "again"))
    answers = again / "answers/after_02/colours.located.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join([lines[0].replace('"text": "', '"text": "not '), *lines[1:]]))
    results = json.loads((again / "results.json").read_text())
    (again / "results.json").write_text(json.dumps(results | {"seed": 7}))
    bind_results(again)
    shutil.rmtree(again / "tasks/02_sides")
    found = differences(run, again)
    assert found.results == ("seed (was 0, now 7)",) and found.stages == ("sides",)
    assert found.answers == {"answers/after_02/colours.located.jsonl": 1} and not found.same


def test_a_route_that_was_measured_later_is_not_compared(lesson_of: Callable[..., Lesson], tmp_path: Path):
    run = lesson_of("sequential_lora").recipe.run
    again = Path(shutil.copytree(run, tmp_path / "again"))
    results = json.loads((again / "results.json").read_text())
    del results["routes"]["oracle"]
    (again / "results.json").write_text(json.dumps(results))
    bind_results(again)
    for answers in again.glob("answers/*/*.oracle.jsonl"):
        answers.unlink()
    assert differences(run, again).same


def test_a_run_is_no_repetition_of_itself(lesson_of: Callable[..., Lesson]):
    run = lesson_of("sequential_lora").recipe.run
    with pytest.raises(RegistryError, match="give the repetition a folder of its own"):
        reproduce(run, run)


def test_a_run_without_results_cannot_be_compared(tmp_path: Path):
    with pytest.raises(RegistryError, match="no such file"):
        reproduce(tmp_path, tmp_path / "again")
