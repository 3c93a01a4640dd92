"""The whole budget of a recipe: what `llava-cmoe plan` says, as values that become JSON.

Sizes come from `course.py`, bytes from `memory.py` and `activations.py`; how it looks is `tables.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from llava_cmoe.backbones.meta_model import meta_model
from llava_cmoe.data.task_data import TaskData, sequence_of
from llava_cmoe.experts import ledger
from llava_cmoe.experts.ledger import Size
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.planning.activations import Activations, activations
from llava_cmoe.planning.dry_run import count_rows
from llava_cmoe.planning.growth_schedule import Grown, TaskSize, expected_sites, grow, growth_of, on_paper, task_sizes
from llava_cmoe.planning.memory import STRATEGIES, Load, Memory, backbone_bytes, memory_of
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.cmoe import CmoeSettings
from llava_cmoe.settings.run import Recipe


@dataclass(frozen=True)
class Course:
    """One assumption of where tasks grow, and what each task then trains and stores.

    Attributes:
        name: of the assumption.
        num_grown: sites that grow for each task after the first; None for a method that does not grow.
        tasks: in order.
        mean: parameters trained per task.
    """

    name: str
    num_grown: int | None
    tasks: tuple[TaskSize, ...]
    mean: float


@dataclass(frozen=True)
class Need:
    """What one stage of training asks of each GPU.

    Attributes:
        stage: what is being learned.
        strategy: how it is spread.
        num_gpus: over how many.
        batch_size: samples that go forward at once on each.
        memory: bytes of one process, by part.
        activations: bytes of one process's batch.
    """

    stage: str
    strategy: str
    num_gpus: int
    batch_size: int
    memory: Memory
    activations: Activations


class Budget(BaseModel):
    """Everything that learning with a recipe costs, before it is begun."""

    model_config = ConfigDict(frozen=True)

    backbone: str
    """Path or name of the backbone."""
    method: str
    """Name of the method."""
    frozen_parameters: int
    """Of the backbone."""
    backbone_bytes: dict[str, int]
    """The frozen weights in memory, by quantization."""
    expert_parameters: dict[str, int]
    """Site name to parameters of one expert there; empty for a method without experts per site."""
    courses: tuple[Course, ...]
    """Where tasks may grow, and what they then train and store."""
    length: int
    """Tokens of a sample."""
    needs: tuple[Need, ...]
    """Memory per stage, strategy and number of GPUs."""
    samples: int | None = None
    """Samples that are learned from over the whole sequence, every pass and probing counted."""
    hours: float | None = None
    """Hours for them at the given throughput, all GPUs together."""


def budget(
    recipe: Recipe,
    *,
    num_grown: int | None = None,
    length: int | None = None,
    gpus: Sequence[int] = (8,),
    throughput: float | None = None,
    rows: int | None = None,
) -> Budget:
    """Compute the budget of a recipe; nothing is loaded, nothing is written.

    Args:
        recipe: the run to be.
        num_grown: sites that grow for each task after the first; as Eq. 2 makes likely if absent.
        length: tokens of a sample; the longest that the recipe admits if absent.
        gpus: numbers of GPUs.
        throughput: samples per second of all GPUs together.
        rows: training rows per task; counted in the recipe's data if absent.

    Raises:
        RecipeError: a method that learns nothing, more sites than there are, a length that holds no picture, or
            hours of unknown data.
        BackboneError: no config to be found.
    """
    frame, empty = meta_model(recipe.backbone), on_paper(recipe)
    banks = empty.host.banks if isinstance(empty, Cmoe) else {}
    num_tasks = sum(bool(stage.learns) for stage in empty.stages(sequence_of(recipe.data).names))
    if num_tasks == 0:
        raise RecipeError(f"method {recipe.method.name} learns nothing, so there is nothing to plan")
    courses = _courses(recipe, tuple(banks), num_tasks, num_grown)
    length = length or recipe.training.max_length
    samples = None if throughput is None else _samples(recipe, rows)
    return Budget(
        backbone=recipe.backbone.path,
        method=recipe.method.name,
        frozen_parameters=frame.num_parameters(),
        backbone_bytes=backbone_bytes(frame),
        expert_parameters={site: ledger.expert_parameters(bank) for site, bank in banks.items()},
        courses=courses,
        length=length,
        needs=tuple(_needs(recipe, courses[0], tuple(banks), length, gpus)),
        samples=samples,
        hours=samples / throughput / 3600 if samples and throughput else None,
    )


def _courses(recipe: Recipe, sites: tuple[str, ...], num_tasks: int, num_grown: int | None) -> tuple[Course, ...]:
    """The given or likely growth, and growth everywhere; one course for a method that does not grow."""
    method = recipe.method
    if not isinstance(method, CmoeSettings):
        return (_course(recipe, "every task", None, ({},) * num_tasks),)
    likely = expected_sites(method.probe, len(sites)) if num_grown is None else num_grown
    if not 0 <= likely <= len(sites):
        raise RecipeError(f"--layers {likely}: {len(sites)} sites may grow; ask for 0 to {len(sites)}")
    return tuple(
        _course(recipe, f"{count} of {len(sites)} sites", count, growth_of(method, sites, num_tasks, count))
        for count in sorted({likely, len(sites)})
    )


def _course(recipe: Recipe, name: str, num_grown: int | None, tasks: Sequence[Grown]) -> Course:
    sizes = task_sizes(recipe, tasks)
    return Course(name, num_grown, sizes, sum(size.trained.parameters for size in sizes) / len(sizes))


def _needs(recipe: Recipe, course: Course, sites: tuple[str, ...], length: int, gpus: Sequence[int]) -> Iterator[Need]:
    """Memory of the stages that may need most: the first task grows most, the last one has the largest pool.

    Probing has as large a pool, a probe at every site, and batches of its own.
    """
    frame, method, training = meta_model(recipe.backbone), recipe.method, recipe.training
    stages: dict[str, tuple[tuple[Grown, ...], int]] = {"every task": ((), training.batch_size)}
    if isinstance(method, CmoeSettings):
        tasks = growth_of(method, sites, len(course.tasks), course.num_grown or 0)
        stages = {"first task": (tasks[:1], training.batch_size)}
        if len(tasks) > 1:
            probes = dict.fromkeys(sites, method.probe.max_new_experts)
            stages["probing for the last"] = (*tasks[:-1], probes), method.probe.batch_size or training.batch_size
            stages["last task"] = tasks, training.batch_size
    for stage, (tasks, batch_size) in stages.items():
        learner = on_paper(recipe)
        if isinstance(learner, Cmoe):
            grow(learner, tasks)
        load = Load(
            backbone=backbone_bytes(frame),
            frozen=frame.num_parameters(),
            pool=sum((size.trained for size in course.tasks[: max(0, len(tasks) - 1)]), start=Size()),
            trained=ledger.trainable(learner.model),
            optimizer=training.optimizer,
        )
        kept = activations(learner, training.model_copy(update={"batch_size": batch_size}), length)
        for strategy in STRATEGIES:
            for num_gpus in gpus:
                memory = memory_of(load, strategy, num_gpus)
                yield Need(stage, strategy.name, num_gpus, batch_size, memory, kept)


def _samples(recipe: Recipe, rows: int | None) -> int:
    """How many samples go forward and backward over the sequence."""
    counts = [task.train if rows is None else rows for task in count_rows(TaskData.open(recipe.data, recipe.seed))]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        raise RecipeError(f"{recipe.data.root} does not exist, so its rows are not known; give --rows, a task's mean")
    learned = sum(known) * recipe.training.epochs
    if isinstance(recipe.method, CmoeSettings):
        learned += sum(known[1:]) * recipe.method.probe.fraction * (1 - recipe.method.probe.holdout)
    return round(learned)
