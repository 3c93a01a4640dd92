"""LoRA per task: a fresh stock adapter for every task, frozen after it, and a locator that chooses whose answers.

    y = W0 x + (alpha / r) B_t* A_t* x        t* located per sample, as in LLaVA-CMoE

The plain control of every method that locates: nothing is shared, nothing is mixed, nothing can be forgotten. What such
a method gains beyond this row, it does not owe to its locator.

An adapter is one expert of rank r in every linear of the LLM's attention and FFNs, which computes what PEFT's LoRA does
(a test compares them), follows a plan per sample, and so answers a batch of mixed tasks at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_cmoe.backbones.sites import linear_sites
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.constant import OwnExpert
from llava_cmoe.experts.state import TaskState, restore, state_of
from llava_cmoe.experts.surgery import ExpertHost, install
from llava_cmoe.methods.base import (
    Costs,
    DeferredLocation,
    ExtraLoss,
    FitFn,
    Method,
    PlannedFit,
    StageData,
    Tensors,
    no_extra_loss,
)
from llava_cmoe.methods.locating import TaskLocating
from llava_cmoe.records import Growth, Learned, Located
from llava_cmoe.settings.methods.lora_per_task import LoraPerTaskSettings


class LoraPerTask(Method):
    """One adapter per task; task t's is expert t of every linear."""

    costs = Costs(
        trained="r * (I + O) per linear, and a locator",
        stored="its adapter and locator",
        answer="one adapter, and locating",
    )

    host: ExpertHost
    routers: dict[str, Any]
    """By site, of whatever kind: they say whose experts take part."""
    locates = True
    num_new = 1
    """Experts that a task adds to every site."""

    def __init__(self, settings: LoraPerTaskSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Make room for adapters beside every linear of the LLM's attention and FFNs."""
        del seed
        self.model, self.processor = model, processor
        self.host = install(model, linear_sites(model), lambda _: OwnExpert(), rank=settings.rank, alpha=settings.alpha)
        self.routers = self.host.routers(OwnExpert)
        self.locating = TaskLocating(settings.locator, model, processor, self.host.context)

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """An adapter everywhere for every task."""
        del num_grown
        for stage in range(num_stages):
            self.grow(seed=0)
            yield PlannedFit(
                stage, "training", num_sites=len(self.host.banks), also_stored=self.locating.planned_size()
            )
            self.host.freeze()

    def before_task(self, data: StageData, fit: FitFn) -> Growth:
        """Add the task's adapter."""
        del fit
        self.grow(data.seed)
        return Growth(dict.fromkeys(self.host.banks, self.num_new))

    def grow(self, seed: int) -> None:
        """An adapter as LoRA begins: A random, B zero."""
        generator = torch.Generator().manual_seed(seed)
        for site, bank in self.host.banks.items():
            bank.grow(1, generator=generator)
            self.routers[site].add_task()

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """The task's own adapter for every sample."""
        newest = next(iter(self.routers.values())).num_tasks - 1
        with self.host.context.use(RoutePlan.single(newest), batch):
            yield no_extra_loss

    def after_task(self, data: StageData) -> Learned:
        """Freeze the adapter for good, and fit the task's locator."""
        state, trained = state_of(self.host.banks, data.index), ledger.trained(self.host.banks)
        self.host.freeze()
        location = self.locating.learn_task(data)
        facts = {"trainable_parameters": trained.total.parameters, **location.facts}
        routers = {"routers": state.routers} if state.routers else {}
        return Learned({"experts": state.experts, **routers, **location.tensors}, facts, location.seconds)

    def restore(self, tensors: Tensors) -> None:
        """Add the next task's adapter and locator as they were committed."""
        restore(self.host.banks, TaskState(tensors["experts"], tensors.get("routers", {})))
        self.host.freeze()
        self.locating.restore(dict(tensors["locator"]))

    def answering(self, batch: Batch, task_B: Tensor | None = None) -> AbstractContextManager[DeferredLocation]:
        """Each sample's task, given or located, names its adapter."""
        return self.locating.answering(batch, task_B)

    @property
    def answers_by_task(self) -> bool:
        """A task's adapter is frozen after it, and no other one answers with it unless selection is soft."""
        return self.locating.chooses_one

    def locate(self, batch: Batch) -> Located:
        """By the locators of all tasks so far."""
        return self.locating.locate(batch)
