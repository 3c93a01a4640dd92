"""Experts of another run, locators of one's own: runs that differ in the locator alone need not be trained twice.

Growth, experts and routers never see the locator, so what is taken over is what training would give again. A run made
so is an ordinary run; learning goes on from it like from any other (`sequence.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from llava_cmoe.data.task_data import TaskData
from llava_cmoe.evaluation.log import Results, check_answers, read_answers, write_answers
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.provenance.versions import installed
from llava_cmoe.records import Learned
from llava_cmoe.registry.restore import restore_stage
from llava_cmoe.registry.schema import RegistryError, TaskRecord, differing_keys, recipe_facts
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.progress import place
from llava_cmoe.runs.run import Progress, Run, begin, open_run
from llava_cmoe.runs.stage import stage_data
from llava_cmoe.sequence import learn
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.cmoe import CmoeSettings
from llava_cmoe.settings.run import Recipe

UNLOCATED = ("oracle", "random")
"""Routes whose answers no locator had a hand in."""


def refit_locator(recipe: Recipe, source: Path, progress: Progress = lambda *_: None, force: bool = False) -> Results:
    """Take over what another run learned, fit each task's locator as the recipe says, and go on as `learn` does.

    Killed, it goes on with the same call, and also with `learn`, which then trains what was not taken over yet.

    Args:
        recipe: of the new run.
        source: folder of the run that has the experts; it may have learned a part of the sequence.
        progress: called with what is being done.
        force: go on with another recipe, data, backbone or number of processes than began the new run.

    Raises:
        RecipeError: the method does not locate, or the recipes differ in more than the locator and the evaluation.
        RegistryError: the source was learned from other data, on another backbone or with other versions.
    """
    earlier = Registry(source)
    check_source(recipe, earlier)
    take_over(open_run(recipe, writer=True, force=force), earlier, progress, force)
    return learn(recipe, progress, force)


def check_source(recipe: Recipe, source: Registry) -> None:
    """Stop unless a run's experts can be taken over: a recipe that differs in locator and evaluation, the same data.

    Loads no model; whether the backbone is the same is seen once it is loaded.
    """
    if not can_refit(recipe):
        raise RecipeError(f"{recipe.run}: method {recipe.method.name} does not locate; cmoe does")
    if differences := list(differing_keys(expert_settings(source.recipe()), expert_settings(recipe))):
        raise RecipeError(
            f"{source.run}: its experts were learned with another recipe: {', '.join(differences)}; only "
            "method.locator and evaluation may differ where experts are taken over"
        )
    data = TaskData.of(recipe)
    for record in source.records()[len(Registry(recipe.run).records()) :]:
        is_same = {
            "other data": record.data_fingerprint == data.fingerprint,
            "other versions": installed(record.versions),
        }
        _check_same(source, record, is_same)


def can_refit(recipe: Recipe) -> bool:
    """Whether a recipe's method learns experts that another locator could be fitted to."""
    return isinstance(recipe.method, CmoeSettings)


def expert_settings(recipe: Recipe) -> dict[str, object]:
    """Every setting of a recipe that growth, experts and routers depend on."""
    facts = recipe_facts(recipe)
    method = {key: value for key, value in facts["method"].items() if key != "locator"}
    return {key: value for key, value in facts.items() if key != "evaluation"} | {"method": method}


def take_over(run: Run, source: Registry, progress: Progress, force: bool = False) -> None:
    """Commit all that the source learned with locators of this run, and copy the answers that have none."""
    begin(run, force)
    taken = run.registry.records()
    for index, record in enumerate(source.records()):
        if index < len(taken):
            restore_stage(run.method, run.registry, taken[index], run.backbone)
        else:
            _take(run, source, record, partial(progress, place(index, [stage.name for stage in run.stages])))


def _take(run: Run, source: Registry, record: TaskRecord, at: Callable[[str, int, int], None]) -> None:
    _check_same(source, record, {"another backbone": record.backbone_fingerprint == run.backbone.fingerprint})
    at("locating", 0, 1)
    assert isinstance(run.method, Cmoe), "checked with the recipe"
    data = stage_data(run, record.index, run.stages[record.index])
    learned = run.method.refit(source.tensors_of(record), data)
    if run.processes.is_main_process:
        _copy_answers(run, source, record.index)
        run.registry.commit(
            record.index,
            record.name,
            Learned(learned.tensors, {**record.facts, **learned.facts}),
            data_fingerprint=run.data.fingerprint,
            backbone_fingerprint=run.backbone.fingerprint,
            seconds={**record.seconds, **learned.seconds},
        )
    run.processes.wait_for_everyone()


def _check_same(source: Registry, record: TaskRecord, same: Mapping[str, bool]) -> None:
    for other, is_same in same.items():
        if not is_same:
            raise RegistryError(
                f"{source.run}: {record.name} was learned with {other} than now; "
                "train the new run instead of taking experts over"
            )


def _copy_answers(run: Run, source: Registry, after: int) -> None:
    eval_spec, folder = run.eval_spec, source.run / run.eval_spec.folder.name
    theirs, ours = source.recipe().evaluation, eval_spec.settings
    if any(getattr(theirs, key) != getattr(ours, key) for key in ("batch_size", "split", "limit", "subset_seed")):
        return  # other questions; and the last bits of a logit may depend on who shares the batch
    check_answers(source.run)
    for path in sorted((folder / eval_spec.answers_folder(after).name).glob("*.jsonl")):
        if path.stem.rpartition(".")[2] in UNLOCATED:
            eval_spec.answers_folder(after).mkdir(parents=True, exist_ok=True)
            write_answers(eval_spec.answers_folder(after) / path.name, read_answers(path))
