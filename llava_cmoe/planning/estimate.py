"""The whole budget of a recipe: what `llava-cmoe plan` prints, as values that become JSON.

Sizes come from `growth_schedule.py`, bytes from `memory.py` and `activations.py`; how it looks is `tables.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from llava_cmoe.backbones.meta_model import meta_model
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.experts import ledger
from llava_cmoe.experts.ledger import Size
from llava_cmoe.methods.base import Method, PlannedFit, Stage
from llava_cmoe.planning.activations import Activations, activations
from llava_cmoe.planning.dry_run import count_rows
from llava_cmoe.planning.growth_schedule import (
    GrowthSchedule,
    expert_sizes,
    fits_on_paper,
    growth_schedules,
    on_paper,
)
from llava_cmoe.planning.memory import STRATEGIES, Memory, ModelStates, backbone_bytes, memory_of
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.run import Recipe


@dataclass(frozen=True)
class Need:
    """What one training needs on each GPU.

    Attributes:
        fit: what is trained.
        strategy: how it is spread.
        num_gpus: over how many.
        batch_size: samples that go forward at once on each.
        memory: bytes of one process, by part.
        activations: bytes of one process's batch.
    """

    fit: str
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
    growth_schedules: tuple[GrowthSchedule, ...]
    """Where tasks may grow, and what they then train and store."""
    length: int
    """Tokens of a sample."""
    needs: tuple[Need, ...]
    """Memory per fit, strategy and number of GPUs."""
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
    method, backbone, data = on_paper(recipe), meta_model(recipe.backbone), TaskData.of(recipe)
    stages, sites = [stage for stage in method.stages(data.sequence.names) if stage.learns], expert_sizes(method)
    if not stages:
        raise RecipeError(f"method {recipe.method.name} learns nothing, so there is nothing to plan")
    schedules = growth_schedules(recipe, len(stages), len(sites), num_grown)
    fits = tuple(fits_on_paper(method, len(stages), num_grown))
    length = length or recipe.training.max_length
    samples = None if throughput is None else _samples(data, stages, fits, recipe.training.epochs, rows)
    return Budget(
        backbone=recipe.backbone.path,
        method=recipe.method.name,
        frozen_parameters=backbone.num_parameters(),
        backbone_bytes=backbone_bytes(backbone),
        expert_parameters=sites,
        growth_schedules=schedules,
        length=length,
        needs=tuple(_needs(recipe, backbone, fits, num_grown, length, gpus)),
        samples=samples,
        hours=samples / throughput / 3600 if samples and throughput else None,
    )


def _needs(
    recipe: Recipe,
    backbone: PreTrainedModel,
    fits: Sequence[PlannedFit],
    num_grown: int | None,
    length: int,
    gpus: Sequence[int],
) -> Iterator[Need]:
    """Memory of the fits that may need most."""
    training = recipe.training
    for index, name in _extremes(fits).items():
        method = on_paper(recipe)
        fit = next(islice(fits_on_paper(method, fits[-1].stage + 1, num_grown), index, None))
        states = model_states(backbone, method, training.optimizer)
        batch_size = fit.batch_size or training.batch_size
        kept = activations(method, training.model_copy(update={"batch_size": batch_size}), length)
        for strategy in STRATEGIES:
            for num_gpus in gpus:
                yield Need(name, strategy.name, num_gpus, batch_size, memory_of(states, strategy, num_gpus), kept)


def _extremes(fits: Sequence[PlannedFit]) -> dict[int, str]:
    """Index and name of the fits of the first task, which grows most, and of the last one, which has the largest pool.

    Those of the first one alone where no task grows, as all are alike.
    """
    last = fits[-1]
    names = {last.stage: "last task", 0: "first task"} if last.num_sites is not None else {0: "every task"}
    return {index: f"{fit.label}, {names[fit.stage]}" for index, fit in enumerate(fits) if fit.stage in names}


def model_states(backbone: PreTrainedModel, method: Method, optimizer: str) -> ModelStates:
    """What a method around such a backbone holds as it has grown; what is frozen beside the backbone is the pool."""
    sizes, num_parameters = backbone_bytes(backbone), backbone.num_parameters()
    frozen = ledger.size_of(parameter for parameter in method.model.parameters() if not parameter.requires_grad)
    pool = Size(frozen.parameters - num_parameters, frozen.bytes - sizes["none"])
    return ModelStates(sizes, num_parameters, pool, ledger.trainable(method.model), optimizer)


def _samples(
    data: TaskData, stages: Sequence[Stage], fits: Sequence[PlannedFit], epochs: float, rows: int | None
) -> int:
    """How many samples go forward and backward over the sequence."""
    counts = [task.train if rows is None else rows for task in count_rows(data)]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        raise RecipeError(f"{data.settings.root} does not exist, so its rows are not known; give --rows, a task's mean")
    rows_of = [sum(known[task] for task in stage.learns) for stage in stages]
    return round(sum(rows_of[fit.stage] * fit.row_share * (fit.epochs or epochs) for fit in fits))
