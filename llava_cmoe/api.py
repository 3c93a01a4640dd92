"""The public functions: what the commands `train`, `eval` and `chat` do, for programs; the commands call them, too.

    load       a run as a model whose `generate` locates each prompt; `load(run).chat()` talks to it
    learn      a recipe: `llava-cmoe train`
    evaluate   a run: `llava-cmoe eval`

A user's mistake raises what the commands show in one line: RecipeError, DataError, RegistryError, BackboneError.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llava_cmoe.analyses.refit_locator import refit_locator
from llava_cmoe.chat.opening import open_learned
from llava_cmoe.data.task_data import lacks_pocket
from llava_cmoe.evaluation.log import Results
from llava_cmoe.export.learned_model import LearnedModel
from llava_cmoe.pocket.root import make_pocket_root
from llava_cmoe.registry.run_lock import writing
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.run import Progress
from llava_cmoe.sequence import evaluate_run
from llava_cmoe.sequence import learn as learn_recipe
from llava_cmoe.settings.evaluation import EvaluationSettings
from llava_cmoe.settings.recipes import load_recipe, parse_settings
from llava_cmoe.settings.run import Recipe
from llava_cmoe.training.processes import processes


def load(run: Path | str, *, after: int | None = None, merge: int | None = None) -> LearnedModel:
    """A run as a model whose `generate` finds out for each prompt of a batch which task's experts answer.

    Args:
        run: its folder.
        after: as it was after its first `after` stages; as it is now if absent.
        merge: with the experts that this merge of the run leaves.

    Raises:
        RegistryError: no run in this folder, fewer stages are learned, no such merge, or a file is damaged.
        BackboneError: its backbone cannot be used.
    """
    return LearnedModel(open_learned(Path(run), after, merge))


def learn(
    recipe: Recipe | Path | str,
    overrides: Sequence[str] = (),
    *,
    experts: Path | None = None,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Results:
    """Learn a sequence, evaluating after each stage, or go on where that was stopped; all processes of a launch do.

    The pocket sequence is rendered first where it is missing.

    Args:
        recipe: its YAML file, or what was read from one.
        overrides: settings that replace a file's, as `seed=1`.
        experts: run that learned the same experts: only locators are fitted then.
        force: go on with another recipe, data, backbone or process count than began the run.
        progress: called with what is done.

    Raises:
        RecipeError: no such recipe, or a setting that cannot be.
        DataError: the first problem in the data.
        RegistryError: the run was begun with something else.
    """
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides)
    launched = processes()
    if launched.is_main_process and lacks_pocket(settings.data):
        make_pocket_root(settings.data.root, partial(progress, "rendering"), seed=settings.data.pocket_seed or 0)
    launched.wait_for_everyone()
    if experts is not None:
        return refit_locator(settings, experts, progress, force)
    return learn_recipe(settings, progress, force)


def evaluate(
    run: Path | str,
    *,
    routes: Sequence[str] = (),
    batch_size: int | None = None,
    limit: int | None = None,
    subset_seed: int | None = None,
    progress: Progress = lambda *_: None,
) -> Results:
    """Measure what a run has learned so far; what is answered already is not asked again.

    Args:
        run: its folder.
        routes: measured beside the recipe's own: `located`, `oracle`, `random`.
        batch_size: questions answered at once; the recipe's if absent.
        limit: a stratified subset of so many questions per task, in a folder of its own.
        subset_seed: of the subset; the recipe's if absent.
        progress: called with what is done.

    Raises:
        RegistryError: nothing is learned yet, or from other data or on another backbone than now.
        RecipeError: no such route.
    """
    asked = evaluation_of(run, routes=routes, batch_size=batch_size, limit=limit, subset_seed=subset_seed)
    with writing(asked.run, processes().is_main_process):
        return evaluate_run(asked, progress)


def evaluation_of(run: Path | str, *, routes: Sequence[str] = (), **changes: int | None) -> Recipe:
    """The recipe by which `evaluate` measures: the run's own, with what is given in its place; same errors."""
    recipe = Registry(Path(run)).recipe()
    own = recipe.evaluation
    given = {key: value for key, value in changes.items() if value is not None}
    wanted = own.model_dump() | {"routes": [*dict.fromkeys((*own.routes, *routes))]} | given
    evaluation = parse_settings(EvaluationSettings, wanted, source="evaluation", recorded=True)
    return recipe.model_copy(update={"evaluation": evaluation})
