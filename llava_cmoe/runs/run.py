"""A run opened: its data read and checked first, then the backbone loaded and the method put on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accelerate import PartialState

from llava_cmoe.backbones.loading import Backbone, load_backbone, load_processor, reads_images
from llava_cmoe.data.coin import parse_eval, parse_train
from llava_cmoe.data.encoding import SampleRows
from llava_cmoe.data.fit import Fit, check_fit
from llava_cmoe.data.paths import train_file
from llava_cmoe.data.task_data import TaskData, sequence_of
from llava_cmoe.evaluation.eval_spec import EvalSpec, eval_spec_of
from llava_cmoe.methods import method_of
from llava_cmoe.methods.base import Method, Stage
from llava_cmoe.registry.restore import build_method, restore_stages
from llava_cmoe.registry.schema import RegistryError, Sources
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.sizes import check_sizes
from llava_cmoe.settings.run import Recipe
from llava_cmoe.training.processes import check_engine_holds, processes


class Progress(Protocol):
    """Called while a run is at work."""

    def __call__(self, where: str, what: str, done: int, total: int, loss: float | None = None, /) -> None:
        """Where it is (`progress.place`), what it does (`training`), how much is done, of how much; a loss at times."""
        ...


@dataclass(frozen=True)
class Run:
    """Everything a run works with."""

    recipe: Recipe
    data: TaskData
    eval_spec: EvalSpec
    backbone: Backbone
    method: Method
    registry: Registry
    processes: PartialState

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is learned in one go, in order."""
        return self.method.stages(self.data.sequence.names)

    @property
    def sources(self) -> Sources:
        """What it learns from, and on, by content."""
        return Sources(data_files=self.data.files, backbone_fingerprint=self.backbone.fingerprint)


def open_run(recipe: Recipe, writer: bool = False, force: bool = False) -> Run:
    """Read and check everything that needs no weights, then load the backbone and put the method on it.

    Args:
        recipe: of the run.
        writer: the run is to learn; only then may the main process commit tasks.
        force: a recipe or data that differ from those that began the run are no error here.

    Raises:
        DataError: the first problem in the data, or a sample that the backbone cannot take, as `check_rows` finds it.
        RegistryError: the run was begun with another recipe or other data, or another process is writing to it.
        LaunchError: the launch's engine cannot hold what the recipe learns.
        BackboneError: the backbone cannot be used.
    """
    launched, data = processes(), TaskData.of(recipe)
    registry = Registry(recipe.run, writer=writer and launched.is_main_process)
    check_engine_holds(recipe)
    data.check(reads_images(recipe.backbone))
    eval_spec = eval_spec_of(data, recipe.evaluation, recipe.run)
    if not force:
        registry.check_data(recipe, data.files)
    if writer:
        if not force:
            registry.check_recipe(recipe, launched.num_processes)
        check_rows(recipe, data, len(registry.records()))  # before the recipe is on record, so that it can change
        registry.claim()
    backbone = load_backbone(recipe.backbone)
    backbone.model.to(launched.device)
    return Run(
        recipe=recipe,
        data=data,
        eval_spec=eval_spec,
        backbone=backbone,
        method=build_method(recipe, backbone),
        registry=registry,
        processes=launched,
    )


def open_learned(recipe: Recipe, stages: int | None = None) -> Run:
    """A run as it was after its first `stages` stages, or as it is now: to look at, not to learn in.

    Raises:
        RegistryError: nothing is learned yet, or not so much, or from other data or on another backbone than now.
    """
    check_learned(recipe, stages)
    run = open_run(recipe)
    run.registry.check_sources(recipe, run.sources)
    restore_stages(run.method, run.registry, run.backbone, stages)
    return run


def subset_folder(recipe: Recipe) -> Path:
    """Where a subset of questions is measured: the run's folder if it is its recipe's, else `subsets/50_0` in there.

    Raises:
        RegistryError: no run was begun here.
    """
    wanted, own = recipe.evaluation, Registry(recipe.run).recipe().evaluation
    if wanted.limit == own.limit and (wanted.limit is None or wanted.subset_seed == own.subset_seed):
        return recipe.run
    return recipe.run / "subsets" / ("all" if wanted.limit is None else f"{wanted.limit}_{wanted.subset_seed}")


def done_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages that a run has learned, and those that learn nothing; needs no model.

    Raises:
        RegistryError: there is none.
    """
    num_learned = len(Registry(recipe.run).records())
    stages = method_of(recipe.method).stages(sequence_of(recipe.data).names)
    done = tuple(stage for index, stage in enumerate(stages) if index < num_learned or not stage.learns)
    if not done:
        raise RegistryError(f"{recipe.run}: nothing is learned yet; train the run, then evaluate it")
    return done


def check_learned(recipe: Recipe, stages: int | None = None) -> int:
    """How many stages a run has learned; needs no model.

    Raises:
        RegistryError: none, or fewer than `stages`.
    """
    learned = len(Registry(recipe.run).records())
    if not learned:
        raise RegistryError(f"{recipe.run}: nothing is learned yet; train the run first")
    if stages is not None and not 0 < stages <= learned:
        raise RegistryError(f"{recipe.run}: {learned} stages are learned, not {stages}; name 1 to {learned}")
    return learned


def begin(run: Run, force: bool = False) -> None:
    """Put on record what begins the run, or check that it goes on with what began it; all processes call this."""
    if run.processes.is_main_process:
        run.registry.open_run(run.recipe, run.processes.num_processes, force, run.sources)
    run.processes.wait_for_everyone()


def check_rows(recipe: Recipe, data: TaskData, num_learned: int) -> None:
    """Stop at the first sample that the backbone cannot take among all that are still to be learned, or asked.

    Raises:
        DataError: names the file and the sample, which is too long, holds a special token of the backbone, or its chat
            template cannot render; or a stage
            has too few.
    """
    processor, stages = load_processor(recipe.backbone.path), method_of(recipe.method).stages(data.sequence.names)
    check_sizes(recipe, data, stages, num_learned)
    fit, root = Fit(processor), recipe.data.root
    for task in (task for stage in stages[num_learned:] for task in stage.learns):
        spec = data.sequence.tasks[task]
        check_fit(data.train[spec.name], fit, parse_train, root, spec)
        rows = SampleRows(data.train[spec.name], data.encoding(spec, processor), recipe.training.max_length)
        rows.check_lengths(train_file(root, spec))
    asks = parse_eval if recipe.evaluation.split == "test" else parse_train
    for spec in data.sequence.tasks:
        check_fit(data.evaluate[spec.name], fit, asks, root, spec)
