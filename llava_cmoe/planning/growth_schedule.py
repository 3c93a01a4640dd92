"""A sequence learned on paper: the real method on its backbone's meta model, grown stage by stage, and counted.

Nothing is trained and no weight exists, so where a stage grows is assumed, not probed. Memory is `memory.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from transformers import ProcessorMixin

from llava_cmoe.backbones.loading import Backbone
from llava_cmoe.backbones.meta_model import meta_model
from llava_cmoe.experts import ledger
from llava_cmoe.experts.ledger import Size
from llava_cmoe.methods.base import Method, PlannedFit
from llava_cmoe.registry.restore import build_method
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.run import Recipe


@dataclass(frozen=True)
class TaskSize:
    """What learning one task trains, and what its directory stores besides, such as a locator."""

    trained: Size
    also_stored: Size

    @property
    def stored(self) -> Size:
        """The tensors on disk; each of the files adds a few kilobytes of names and shapes."""
        return self.trained + self.also_stored


@dataclass(frozen=True)
class GrowthSchedule:
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


def on_paper(recipe: Recipe) -> Method:
    """A recipe's method around its backbone's meta model, before the first stage."""
    model = meta_model(recipe.backbone).requires_grad_(False)
    no_processor = cast(ProcessorMixin, None)  # a processor reads data, and there is none
    with torch.device("meta"):
        return build_method(recipe, Backbone(model, no_processor, fingerprint="", quantization="none"))


def fits_on_paper(method: Method, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
    """The method's planned fits, grown without memory; what each of them trains requires gradients until the next."""
    fits = method.planned_fits(num_stages, num_grown)
    while True:
        with torch.device("meta"):
            fit = next(fits, None)
        if fit is None:
            return
        yield fit


def growth_schedules(
    recipe: Recipe, num_tasks: int, num_sites: int, num_grown: int | None
) -> tuple[GrowthSchedule, ...]:
    """The given or likely growth, then growth everywhere; one schedule for a method that does not grow.

    Raises:
        RecipeError: more sites are to grow than there are.
    """
    if num_grown is not None and not 0 <= num_grown <= num_sites:
        raise RecipeError(f"--layers {num_grown}: {num_sites} sites may grow; give 0 to {num_sites}")
    schedule = growth_schedule(recipe, num_tasks, num_grown)
    if schedule.num_grown in (None, num_sites):
        return (schedule,)
    everywhere = growth_schedule(recipe, num_tasks, num_sites)
    return (schedule,) if everywhere == schedule else (schedule, everywhere)


def growth_schedule(recipe: Recipe, num_tasks: int, num_grown: int | None = None) -> GrowthSchedule:
    """One schedule, of at least one task; `num_grown` as the method's `planned_fits` takes it."""
    method, sizes = on_paper(recipe), dict[int, TaskSize]()
    for fit in fits_on_paper(method, num_tasks, num_grown):
        sizes[fit.stage] = TaskSize(ledger.trainable(method.model), fit.also_stored)  # of its last fit, in the end
    name = "every task" if fit.num_sites is None else f"{fit.num_sites} of {len(expert_sizes(method))} sites"
    mean = sum(size.trained.parameters for size in sizes.values()) / num_tasks
    return GrowthSchedule(name, fit.num_sites, tuple(sizes.values()), mean)


def expert_sizes(method: Method) -> dict[str, int]:
    """Site name to parameters of one expert there; empty for a method without banks."""
    banks = method.host.banks if method.host else {}
    return {site: ledger.expert_parameters(bank) for site, bank in banks.items()}
