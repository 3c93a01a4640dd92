"""Locators anew for learned experts: the very run that training would have made, without the training."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import refused
from tiny import Lesson, files_of

from llava_cmoe import sequence
from llava_cmoe.analyses import refit_locator as analysis
from llava_cmoe.analyses.refit_locator import refit_locator
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.evaluation.log import read_results
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs import run as runs
from llava_cmoe.settings.run import Recipe

OTHER = ("method.locator.kind=prototype", "method.locator.feature=mean")


@pytest.fixture
def lesson(lesson_of: Callable[..., Lesson]) -> Lesson:
    return lesson_of("cmoe")


def recipe_for(lesson: Lesson, run: Path, **locator: object) -> Recipe:
    """The lesson's, with another locator, for a run of its own."""
    method = lesson.recipe.method
    changed = method.model_copy(update={"locator": method.locator.model_copy(update=locator)})
    return lesson.recipe.model_copy(update={"run": run, "method": changed})


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in files_of(folder).items()}


def refuse_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "fit_fn", lambda *_: pytest.fail("something was trained"))


def test_what_is_taken_over_is_what_training_gives(lesson_of, lesson: Lesson, tmp_path: Path, monkeypatch):
    trained = lesson_of("cmoe", *OTHER)
    refuse_to_train(monkeypatch)
    recipe = trained.recipe.model_copy(update={"run": tmp_path / "taken"})
    results = refit_locator(recipe, lesson.recipe.run)
    by_hand, by_training = (Registry(run).records() for run in (recipe.run, trained.recipe.run))
    assert [record.sha256 for record in by_hand] == [record.sha256 for record in by_training]
    assert content(recipe.run / "answers") == content(trained.recipe.run / "answers")
    assert results.routes == trained.results.routes and results.locator == trained.results.locator
    assert results.locator != lesson.results.locator or results.stored_bytes != lesson.results.stored_bytes


def test_killed_between_two_tasks_it_goes_on_and_plain_learning_finishes_it_too(lesson: Lesson, tmp_path, monkeypatch):
    whole = refit_locator(recipe_for(lesson, tmp_path / "whole", kind="gaussian"), lesson.recipe.run)
    take = analysis._take

    def killed(run, source, record, at) -> None:
        if record.index == 1:
            raise KeyboardInterrupt
        take(run, source, record, at)

    recipe = recipe_for(lesson, tmp_path / "again", kind="gaussian")
    monkeypatch.setattr(analysis, "_take", killed)
    with pytest.raises(KeyboardInterrupt):
        refit_locator(recipe, lesson.recipe.run)
    monkeypatch.undo()
    shutil.copytree(recipe.run, tmp_path / "learned")
    assert len(Registry(recipe.run).records()) == 1
    for results in (
        refit_locator(recipe, lesson.recipe.run),
        sequence.learn(recipe.model_copy(update={"run": tmp_path / "learned"})),
    ):
        assert results.routes == whole.routes and results.locator == whole.locator
    assert read_results(tmp_path / "again/results.json").finished


def test_answers_without_a_locator_are_copied_and_those_with_one_are_not(lesson: Lesson, tmp_path: Path, monkeypatch):
    asked: list[str] = []
    generate = sequence.evaluate_after

    def looked_on(eval_spec, questions, candidate, after, processes, progress):
        asked.extend(path.name for path in sorted(eval_spec.answers_folder(after).glob("*.jsonl")))
        return generate(eval_spec, questions, candidate, after, processes, progress)

    monkeypatch.setattr(sequence, "evaluate_after", looked_on)
    refit_locator(recipe_for(lesson, tmp_path / "run", kind="prototype"), lesson.recipe.run)
    routes = {name.split(".")[1] for name in asked}
    assert routes == {"oracle", "random"} and len(asked) == 2 * (1 + 2)


def test_other_experts_are_refused(lesson: Lesson, lesson_of, tmp_path: Path, monkeypatch):
    words = [tmp_path / "recipe.yaml", "--experts", lesson.recipe.run, f"run={tmp_path / 'run'}"]
    shutil.copy(lesson.recipe.run.parent / "recipe.yaml", tmp_path)
    refusal = refused("train", *words, "method.experts.rank=2", *OTHER, "evaluation.batch_size=2")
    assert "method.experts.rank (was 4, now 2)" in refusal and "locator.kind" not in refusal
    assert "batch_size" not in refusal and not (tmp_path / "run").exists()
    lora = lesson_of("sequential_lora").recipe
    assert "does not locate" in refused("train", lora.run.parent / "recipe.yaml", "--experts", lora.run)


@pytest.mark.parametrize("other", ["other data", "other versions", "another backbone"])
def test_experts_of_other_data_versions_or_weights_are_refused_if_possible_before_a_model_is_loaded(
    other: str, lesson: Lesson, tmp_path: Path, monkeypatch
):
    open_run = analysis.open_run

    def on_another_backbone(*args: Any, **words: Any) -> runs.Run:
        run = open_run(*args, **words)
        return replace(run, backbone=replace(run.backbone, fingerprint="changed"))

    if other == "another backbone":  # only a loaded one can be told apart
        monkeypatch.setattr(analysis, "open_run", on_another_backbone)
    else:
        monkeypatch.setattr(runs, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))
    if other == "other data":
        monkeypatch.setattr(TaskData, "fingerprint", "changed")
    if other == "other versions":
        monkeypatch.setattr(analysis, "installed", lambda recorded: False)
    with pytest.raises(RegistryError, match=f"colours was learned with {other} than now"):
        refit_locator(recipe_for(lesson, tmp_path / "run"), lesson.recipe.run)
    assert not Registry(tmp_path / "run").records()
