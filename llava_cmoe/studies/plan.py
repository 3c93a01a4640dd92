"""Which runs a study has, all of them checked before the first one starts; learning them is `jobs.py`'s.

    runs/studies/NAME/VARIANT_SEED/        an ordinary run
    runs/studies/NAME/VARIANT_SEED.log     what its command printed

A variant is a list of dotted overrides, as `llava-cmoe train` takes them, so that each run of a study can be repeated
by hand.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from rich.table import Table

from llava_cmoe.analyses.refit_locator import can_refit, expert_settings
from llava_cmoe.data.paths import files_of
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.task_data import lacks_pocket, sequence_of
from llava_cmoe.data.tasks import TaskSpec
from llava_cmoe.evaluation.log import Results, read_results
from llava_cmoe.evaluation.scorers import get_scorer
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.base import RecipeError, Settings
from llava_cmoe.settings.recipes import load_recipe, parse_settings, read_yaml, shipped
from llava_cmoe.settings.run import Recipe

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
"""What can name a folder everywhere."""


class Study(Settings):
    """A study file: variants of one recipe, each learned from several seeds."""

    name: str = Field(pattern=f"^{NAME}$")
    """Name of the study, and of its folder."""
    recipe: str
    """Recipe that the variants change: a file from here, or one that ships with this package."""
    recipes: dict[str, str] = Field(default_factory=dict)
    """Name of a variant to the recipe that it changes, where that is another one."""
    common: tuple[str, ...] = ()
    """Dotted overrides of all runs: `data.train_rows=800`."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Seeds that each variant is learned from."""
    variants: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name of a variant to its dotted overrides."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted key to its values; their product gives further variants, named after key and value: `rank_4-top_k_2`."""

    @field_validator("seeds")
    @classmethod
    def _seeds_are_distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed occurs twice among {seeds}; the same run twice shows no spread")
        return seeds

    def all_variants(self) -> dict[str, tuple[str, ...]]:
        """The named variants, then those of the grid, the last key's values changing fastest.

        Raises:
            ValueError: no variant, a name that occurs twice, or one that cannot be a folder's.
        """
        variants = dict.fromkeys(self.recipes, ()) | self.variants
        for values in itertools.product(*self.grid.values()) if self.grid else ():
            point = list(zip(self.grid, values, strict=True))
            name = "-".join(f"{key.rpartition('.')[2]}_{value}" for key, value in point)
            if name in variants:
                raise ValueError(f"two variants are named {name}; name one of them otherwise under `variants`")
            variants[name] = tuple(f"{key}={json.dumps(value, default=str)}" for key, value in point)
        for name in variants:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"variant {name!r} cannot name a folder; give it a plain name under `variants`")
        if not variants:
            raise ValueError("nothing is varied; give `variants` or a `grid`")
        return variants


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        study: name of the study.
        variant: name of the variant.
        recipe: as resolved, its run folder included.
        tasks: of its sequence.
        words: the same as `llava-cmoe train` takes it: recipe file and overrides.
        source: an earlier run whose experts it takes over; only their locators differ.
    """

    study: str
    variant: str
    recipe: Recipe
    tasks: tuple[TaskSpec, ...]
    words: tuple[str, ...]
    source: PlannedRun | None = None

    @property
    def name(self) -> str:
        """Study, variant and seed."""
        return f"{self.study}/{self.recipe.run.name}"

    @property
    def log(self) -> Path:
        """Where the run's output goes."""
        return self.recipe.run.with_name(f"{self.recipe.run.name}.log")

    @property
    def num_learned(self) -> int:
        """Stages that are committed."""
        return len(Registry(self.recipe.run).records())

    def results(self) -> Results | None:
        """What was measured, once the run is finished.

        Raises:
            RegistryError: its results cannot be read.
        """
        path = self.recipe.run / "results.json"
        if not path.exists():
            return None
        try:
            results = read_results(path)
        except ValueError as error:
            raise RegistryError(str(error)) from error
        return results if results.finished else None


@dataclass(frozen=True)
class StudyPlan:
    """A study and all its runs, variant by variant."""

    study: Study
    folder: Path
    runs: tuple[PlannedRun, ...]


def plan_studies(files: Sequence[Path], folder: Path) -> tuple[StudyPlan, ...]:
    """Read study files and check every run of theirs.

    Args:
        files: the study files.
        folder: gets a folder per study.

    Raises:
        RecipeError: a key or value that cannot be used, in a study file or in the recipe of one of its runs.
        DataError: data that is not there.
        RegistryError: a run was begun with another recipe.
    """
    first: dict[str, PlannedRun] = {}
    plans = tuple(_plan(file, folder, first) for file in files)
    names = [plan.study.name for plan in plans]
    if len(set(names)) < len(names):
        raise RecipeError(f"two studies have one name among {', '.join(names)}; their runs would lie in one folder")
    runs = [run for plan in plans for run in plan.runs]
    _check_data(runs)
    for run in runs:
        Registry(run.recipe.run).check_recipe(run.recipe)
    return plans


def _plan(file: Path, folder: Path, first: dict[str, PlannedRun]) -> StudyPlan:
    study = parse_settings(Study, read_yaml(file), source=str(file))
    own = folder / study.name
    try:
        variants = study.all_variants()
        runs = tuple(
            _shared(_run(study, own, variant, seed), first) for variant in variants.items() for seed in study.seeds
        )
    except ValueError as error:
        raise RecipeError(f"{file}: {error}") from error
    return StudyPlan(study, own, runs)


def _shared(run: PlannedRun, first: dict[str, PlannedRun]) -> PlannedRun:
    """The run beside the first one, of any study planned with it, that learns the same experts."""
    if not can_refit(run.recipe):
        return run
    source = first.setdefault(json.dumps(expert_settings(run.recipe)), run)
    return run if source is run else replace(run, source=source)


def _run(study: Study, folder: Path, variant: tuple[str, tuple[str, ...]], seed: int) -> PlannedRun:
    name, overrides = variant
    wanted = study.recipes.get(name, study.recipe)
    base = Path(wanted) if Path(wanted).is_file() else shipped(wanted)
    for override in (*study.common, *overrides):
        if override.partition("=")[0] in ("run", "seed"):
            raise ValueError(f"override {override!r}: a study names its runs itself and takes their `seeds`")
    run = json.dumps(str(folder / f"{name}_{seed}"))
    words = (*study.common, *overrides, f"seed={seed}", f"run={run}")
    try:
        recipe = load_recipe(base, words)
        return PlannedRun(study.name, name, recipe, sequence_of(recipe.data).tasks, (str(base), *words))
    except RecipeError as error:
        raise RecipeError(f"variant {name}: {error}") from error


def _check_data(runs: Sequence[PlannedRun]) -> None:
    """Stop at a scorer or file that is not there; a pocket sequence that is missing will be rendered."""
    for run in runs:
        for task in run.tasks:
            get_scorer(task.scorer, run.recipe.evaluation)
    needed = {(run.recipe.data.root, task) for run in runs if not lacks_pocket(run.recipe.data) for task in run.tasks}
    for root, task in sorted(needed, key=str):
        for path in files_of(root, task):
            if not path.is_file():
                raise DataError(Problem(path, f"is missing, task {task.name} needs it"))


def render(plans: Sequence[StudyPlan]) -> Table:
    """Every run with what its variant overrides, and how far it is."""
    table = Table()
    for heading in ("run", "tasks learned", "overrides"):
        table.add_column(heading, overflow="fold")
    for plan in plans:
        variants = plan.study.all_variants()
        for run in plan.runs:
            learned = f"{run.num_learned} of {len(run.tasks)}"
            table.add_row(run.name, learned, " ".join(variants[run.variant]))
    return table
