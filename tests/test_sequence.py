"""A run ends the same, however often it was killed and started again. On several processes: `test_engines.py`."""

import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launched
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import Lesson, files_of

from llava_cmoe import sequence
from llava_cmoe.evaluation.log import comparable, read_results
from llava_cmoe.provenance.fingerprints import fingerprint_file
from llava_cmoe.provenance.invocations import Manifest
from llava_cmoe.provenance.versions import versions
from llava_cmoe.registry.run_lock import LOCK
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.run import Recipe

Make = Callable[..., Recipe]


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    """An uninterrupted run."""
    return lesson_of("cmoe")


@pytest.fixture
def recipe_in(tmp_path: Path, tiny_data: Path, tiny_backbone: Path) -> Make:
    """A tiny recipe in a folder of its own; `run` is the folder's name, which results tell."""

    def make(place: str, method: str = "cmoe", *overrides: str) -> Recipe:
        return tiny.recipe(tmp_path / place / "run", tiny_data, tiny_backbone, method, *overrides)

    return make


def document(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(recipe.model_dump_json())
    return plain


def killed_at(recipe: Recipe, module: str, function: str, call: int) -> None:
    """Start or go on with a run in a process that dies at a chosen call."""
    context = multiprocessing.get_context("forkserver")  # imports once, forks before the first tensor
    context.set_forkserver_preload(["llava_cmoe.sequence"])
    process = context.Process(target=launched.learn_until_killed, args=(document(recipe), module, function, call))
    process.start()
    process.join(timeout=600)
    assert process.exitcode == -signal.SIGKILL


def answers_of(run: Path) -> dict[str, list[str]]:
    """Every answers file's texts."""
    files = sorted((run / "answers").rglob("*.jsonl"))
    return {str(file.relative_to(run)): [json.loads(line)["text"] for line in file.open()] for file in files}


def test_a_finished_run_learns_and_asks_nothing_again(lesson: Lesson, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished run trains and generates nothing")

    monkeypatch.setattr("llava_cmoe.runs.stage.train_stage", refuse)
    monkeypatch.setattr("llava_cmoe.evaluation.generate.answer_batch", refuse)
    before = files_of(lesson.recipe.run)
    again = sequence.learn(lesson.recipe)
    after = files_of(lesson.recipe.run)
    assert again == lesson.results
    assert after.keys() == before.keys()
    rewritten = {name for name in after if after[name] != before[name]}
    assert rewritten <= {"results.json"} and after["results.json"][0] == before["results.json"][0]


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(lesson: Lesson, recipe_in: Make):
    recipe = recipe_in("killed")
    run = recipe.run
    killed_at(recipe, "llava_cmoe.training.stage", "StageTrainer.training_step", 4)  # in the first task's training
    assert not list((run / "tasks").iterdir()) and not (run / "answers").exists()

    killed_at(recipe, "llava_cmoe.evaluation.parts", "_append", 5)  # in its evaluation: all are located, some answered
    assert [path.name for path in (run / "tasks").iterdir()] == ["01_colours"]
    parts = {path.name: path.read_bytes().count(b"\n") for path in (run / "answers").rglob("*.part")}
    name = "colours.located.jsonl"
    assert parts == {f"{name}.4.0.part": tiny.BATCH, f"{name}.locating.4.0.part": tiny.NUM_EVAL}
    assert not (run / "results.json").exists()

    killed_at(recipe, "llava_cmoe.training.stage", "StageTrainer.training_step", 2)  # in the second task's probing
    killed_at(recipe, "llava_cmoe.training.stage", "StageTrainer.training_step", 6)  # in its training
    assert not list((run / "tasks").glob("*02_sides*"))

    killed_at(recipe, "llava_cmoe.registry.store", "_write", 1)  # in its commit: tensors are there, the record is not
    (partial,) = (run / "tasks").glob(".*.partial")
    assert {file.name for file in partial.iterdir()} == {
        f"{group}.safetensors" for group in ("experts", "routers", "locator")
    }

    killed_at(recipe, "llava_cmoe.evaluation.generate", "write_answers", 3)  # where the answers of a cell are merged
    assert not read_results(run / "results.json").finished
    killed_at(recipe, "llava_cmoe.sequence", "write_results", 1)
    assert not read_results(run / "results.json").finished  # whole, and that of the first stage still

    results = sequence.learn(recipe)
    assert comparable(results) == comparable(lesson.results) == comparable(read_results(run / "results.json"))
    last, uninterrupted = (Registry(folder).records()[-1] for folder in (run, lesson.recipe.run))
    assert last.sha256 == uninterrupted.sha256  # of every tensor, through the chain of records
    assert [*run.rglob("*.part*"), *run.rglob(".*")] == [run / LOCK]


def test_every_stage_puts_its_results_and_the_call_that_made_them_on_record(lesson: Lesson, recipe_in: Make):
    recipe = recipe_in("killed")
    results, manifest = recipe.run / "results.json", recipe.run / "manifest.json"
    killed_at(recipe, "llava_cmoe.evaluation.parts", "_append", 1)  # the first stage is learned, nothing is answered
    begun = Manifest.model_validate_json(manifest.read_bytes())
    assert [(call.learned, call.evaluated) for call in begun.calls] == [(("colours",), {})]
    assert begun.results_sha256 is None and not results.exists()

    killed_at(recipe, "llava_cmoe.sequence", "report", 1)  # all is answered, nothing is scored
    assert not results.exists()
    killed_at(recipe, "llava_cmoe.training.stage", "StageTrainer.training_step", 1)  # in the second stage
    for route, measured in read_results(results).routes.items():
        assert measured.matrix == lesson.results.routes[route].matrix[:1]

    (recipe.run / "answers/after_01/colours.oracle.jsonl").unlink()
    killed_at(recipe, "llava_cmoe.training.stage", "StageTrainer.training_step", 1)
    half = Manifest.model_validate_json(manifest.read_bytes())
    assert half.calls[0] == begun.calls[0] and half.results_sha256 == fingerprint_file(results)
    assert [(call.learned, list(call.evaluated)) for call in half.calls[1:]] == [((), ["colours"])]

    sequence.learn(recipe)
    whole = Manifest.model_validate_json(manifest.read_bytes())
    assert whole.calls[:2] == half.calls and whole.results_sha256 == fingerprint_file(results)
    assert [(call.learned, list(call.evaluated)) for call in whole.calls[2:]] == [(("sides",), ["sides"])]
    assert comparable(read_results(results)) == comparable(lesson.results)


def test_a_killed_bf16_run_ends_like_one_that_was_not(recipe_in: Make):
    killed, whole = (recipe_in(name, "cmoe", "training.precision=bf16") for name in ("killed", "whole"))
    killed_at(killed, "llava_cmoe.training.stage", "StageTrainer.training_step", 10)  # in the second task
    for recipe in (killed, whole):
        sequence.learn(recipe)
    ends = [Registry(recipe.run).records()[-1].sha256 for recipe in (killed, whole)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("method", ["ewc", "lwf", "o_lora", "moe_adapters", "pmoe", "r2moe"])
def test_what_a_method_keeps_of_earlier_tasks_comes_back_for_the_next_one(
    recipe_in: Make, lesson_of: Callable[[str], Lesson], method: str
):
    killed, whole = recipe_in("killed", method, "training.checkpoint_steps=5"), lesson_of(method)
    killed_at(killed, "llava_cmoe.training.stage", "StageTrainer.training_step", 6 + 6)  # in the second task
    assert [path.name for path in (killed.run / "tasks").iterdir()] == ["01_colours"]
    assert list(killed.run.glob("trainer/02_sides/training/checkpoint-5/complete.json"))
    sequence.learn(killed)
    ends = [Registry(run).records()[-1].sha256 for run in (killed.run, whole.recipe.run)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("call", [2, 3])
def test_checkpoints_of_a_committed_stage_do_not_outlive_a_kill_behind_its_commit(recipe_in: Make, call: int):
    recipe = recipe_in("killed", "sequential_lora", "training.checkpoint_steps=5")
    killed_at(recipe, "llava_cmoe.sequence", "discard_checkpoints", call)  # the first call begins the run
    assert len(list((recipe.run / "tasks").iterdir())) == call - 1 and list(recipe.run.glob("trainer/*"))
    sequence.learn(recipe)
    assert not (recipe.run / "trainer").exists()


def test_the_seed_decides_the_run_and_nothing_else_does(lesson: Lesson, recipe_in: Make):
    same = sequence.learn(recipe_in("same"))
    assert comparable(same) == comparable(lesson.results)
    other = recipe_in("other", "cmoe", "seed=1")
    sequence.learn(other)
    left, right = (load_file(run / "tasks/01_colours/experts.safetensors") for run in (lesson.recipe.run, other.run))
    assert left.keys() == right.keys() and not any(torch.equal(left[name], right[name]) for name in left)


def test_a_first_stage_that_was_killed_goes_on_only_with_the_data_it_began_with(
    recipe_in: Make, tiny_data: Path, tmp_path: Path
):
    root = Path(shutil.copytree(tiny_data, tmp_path / "root"))
    recipe = recipe_in("killed", "sequential_lora", f"data.root={root}")
    killed_at(recipe, "llava_cmoe.training.stage", "StageTrainer.training_step", 4)
    changed = root / "Instructions_Original/sides/train.json"  # of a task that is still to come
    changed.write_text(changed.read_text() + " ")
    with pytest.raises(RegistryError, match=r"other data .*: Instructions_Original/sides/train\.json; .*--anyway"):
        sequence.learn(recipe)
    assert not list((recipe.run / "tasks").iterdir())


def test_a_first_stage_that_was_killed_never_goes_on_with_weights_of_another_backbone(
    recipe_in: Make, tiny_backbone: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "backbone"))
    words = ("sequential_lora", f"backbone.path={folder}", "training.checkpoint_steps=5")
    killed, whole = recipe_in("killed", *words), recipe_in("whole", *words)
    killed_at(killed, "llava_cmoe.training.stage", "StageTrainer.training_step", 6)
    assert list(killed.run.glob("trainer/01_colours/training/checkpoint-5/complete.json"))
    weights = load_file(folder / "model.safetensors")
    weights = {name: 1.1 * value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RegistryError, match=r"another backbone than .*backbone is now .*--anyway"):
        sequence.learn(killed)
    for recipe in (killed, whole):
        sequence.learn(recipe, force=recipe is killed)
    ends = [Registry(recipe.run).records()[-1].sha256 for recipe in (killed, whole)]
    assert ends[0] == ends[1]  # the checkpoint of the old weights was not gone on with


def test_a_run_goes_on_after_its_last_task_was_taken_back(lesson: Lesson, recipe_in: Make):
    recipe = recipe_in("back")
    shutil.copytree(lesson.recipe.run, recipe.run)
    shutil.rmtree(recipe.run / "tasks/02_sides")
    for stale in (recipe.run / "answers/after_02").iterdir():  # of a model that is gone; nothing may read them again
        stale.write_text(stale.read_text().replace('"text": "', '"text": "stale '))
    assert comparable(sequence.learn(recipe)) == comparable(lesson.results)


def test_results_say_what_made_them(lesson: Lesson):
    results = lesson.results
    assert results.versions == versions()
    assert results.base == lesson.run.backbone.fingerprint and results.data == lesson.run.data.fingerprint
    assert results.recipe["seed"] == results.seed == 0 and "run" not in results.recipe
    assert set(results.sites) == set(lesson.run.method.host.banks)
    parts = dict(results.seconds["sides"])
    total = parts.pop("total")
    assert set(parts) == {"probing", "training", "locating"} and min(parts.values()) > 0 and sum(parts.values()) < total
    assert results.stored_bytes["sides"] == sum(
        file.stat().st_size for file in (lesson.recipe.run / "tasks" / "02_sides").glob("*.safetensors")
    )
