"""A sequence learned on paper: the real method on a backbone's meta_model, grown task by task, and counted.

Nothing is trained and no weight exists, so where a task would grow is given, not probed. Memory is `memory.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import cast

import torch
from transformers import ProcessorMixin

from llava_cmoe.backbones.meta_model import meta_model
from llava_cmoe.experts import ledger
from llava_cmoe.experts.ledger import Size
from llava_cmoe.locators import LOCATORS
from llava_cmoe.methods import METHODS
from llava_cmoe.methods.base import Method
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.records import Growth
from llava_cmoe.settings.locators import LocatorSettings
from llava_cmoe.settings.methods.cmoe import CmoeSettings, ProbeSettings
from llava_cmoe.settings.run import Recipe

Grown = Mapping[str, int]
"""Site name to the number of experts that a task adds there; a site that does not grow is absent."""


@dataclass(frozen=True)
class TaskSize:
    """What learning one task trains, and what its directory stores; the locator is fitted apart and stored."""

    experts: Size
    routers: Size = field(default_factory=Size)
    locator: Size = field(default_factory=Size)

    @property
    def trained(self) -> Size:
        """What the optimizer holds."""
        return self.experts + self.routers

    @property
    def stored(self) -> Size:
        """The tensors on disk; each of the three files adds a few kilobytes of names and shapes."""
        return self.trained + self.locator


def on_paper(recipe: Recipe) -> Method:
    """A recipe's method around its backbone's meta_model, before the first task."""
    model = meta_model(recipe.backbone).requires_grad_(False)
    unasked = cast(ProcessorMixin, None)  # a processor reads data, and there is none
    with torch.device("meta"):
        return METHODS[recipe.method.name](recipe.method, model, unasked, recipe.seed)


def grow(method: Cmoe, tasks: Sequence[Grown]) -> list[ledger.Trained]:
    """Grow as learning these tasks would, and what each trains; what the last one adds stays trainable."""
    trained = []
    with torch.device("meta"):
        for grown in tasks:
            method.host.freeze()
            method.grow(Growth(grown), {}, seed=0)
            trained.append(ledger.trained(method.host.banks))
    return trained


def task_sizes(recipe: Recipe, tasks: Sequence[Grown]) -> tuple[TaskSize, ...]:
    """The size of every task, in order; of a method that does not grow, that of its one set of parameters each time.

    Args:
        recipe: method and backbone.
        tasks: where each task grows, as `growth_of` says; their number counts for every method.
    """
    method = on_paper(recipe)
    if not isinstance(method, Cmoe):
        return (TaskSize(ledger.trainable(method.model)),) * len(tasks)
    trained = grow(method, tasks)
    locator = locator_size(method.settings.locator, int(method.model.config.get_text_config().hidden_size))
    return tuple(TaskSize(one.experts, one.router, locator) for one in trained)


def growth_of(settings: CmoeSettings, sites: Sequence[str], num_tasks: int, num_grown: int) -> tuple[Grown, ...]:
    """Where each task grows: the first one everywhere, each later one at `num_grown` sites, spread over the depth."""
    chosen = [sites[index * len(sites) // num_grown] for index in range(num_grown)]
    first = dict.fromkeys(sites, settings.experts.num_first)
    return (first, *[dict.fromkeys(chosen, settings.probe.max_new_experts)] * (num_tasks - 1))


def expected_sites(settings: ProbeSettings, num_sites: int) -> int:
    """How many sites Eq. 2 lets grow: those whose probe is used more than mean - alpha * std.

    Of uses that are normally distributed these are Phi(alpha), 60 % for alpha 0.25 and 84 % for 1, where three runs of
    the pocket sequence grew in 83 %. With `scope: layer` a probe is compared with its own layer's experts instead,
    and the share is a guess.
    """
    share = {"all": 1.0, "none": 0.0}.get(settings.scope, NormalDist().cdf(settings.alpha))
    return round(share * num_sites)


def locator_size(settings: LocatorSettings, width: int) -> Size:
    """A task's locator, from fitting one to three features of that width: the fewest that can be fitted."""
    fitted = LOCATORS[settings.kind](settings.model_copy(update={"epochs": 1})).fit(torch.randn(3, width), seed=0)
    return ledger.size_of(fitted.values())
