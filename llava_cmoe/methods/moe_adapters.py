"""MoE-Adapters with DDAS (arXiv 2403.11549): a fixed pool of experts, of which every task freezes those it uses most.

    pool      E experts in every FFN, there from the first task on
    learn     a router per task and site gives each sample its top k, with noise     `routers/per_sample.py`
    freeze    the experts that the task used most: later tasks may use, not change them
    answer    an auto-encoder per task (DDAS) names the task whose routers answer; where none fits, the base model

Experts that are not frozen go on learning, so a task whose second choice is one of these can still forget.

The paper decides per batch and reads each layer's first token. Here every sample is decided for itself, by the frozen
feature of its prompt that the locator reads, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_cmoe.backbones.sites import ffn_sites
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.additive import FEATURE
from llava_cmoe.experts.routers.per_sample import SampleRouters
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
from llava_cmoe.methods.frozen_features import normalised
from llava_cmoe.methods.locating import TaskLocating
from llava_cmoe.records import Growth, Learned, Located
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.moe_adapters import MoeAdaptersSettings


class MoeAdapters(Method):
    """A pool per FFN that all tasks share, a router per task and site, and a locator."""

    costs = Costs(
        trained="r * (I + O) per FFN linear and expert that no task froze, 2 E D per FFN, and a locator",
        stored="what learned of the pool, its routers and locator",
        answer="the pool of each FFN, and locating",
    )

    host: ExpertHost
    locates = True

    def __init__(self, settings: MoeAdaptersSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Fill the pool of every FFN with experts that have no effect yet.

        Raises:
            RecipeError: a task freezes or uses more experts than there are.
        """
        if max(settings.top_k, settings.num_frozen) > settings.num_experts:
            raise RecipeError(
                f"method.num_experts is {settings.num_experts}, fewer than method.top_k or method.num_frozen asks for; "
                "make the pool larger"
            )
        self.settings, self.model, self.processor = settings, model, processor
        width = int(model.config.get_text_config().hidden_size)
        self.host = install(
            model,
            ffn_sites(model),
            lambda _: SampleRouters(width, settings.top_k),
            rank=settings.rank,
            alpha=settings.alpha,
        )
        self.routers = self.host.routers(SampleRouters)
        self.locating = TaskLocating(settings.locator, model, processor, self.host.context)
        generator = torch.Generator().manual_seed(seed)
        for bank in self.host.banks.values():
            bank.grow(settings.num_experts, generator=generator)
        self._of_rows_SD = torch.empty(0, width)

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """What is not frozen yet learns in every stage; each is taken to freeze experts that no other one did."""
        del num_grown
        chosen = torch.zeros(self.settings.num_frozen, dtype=torch.long)
        stored = self.locating.planned_size() + ledger.size_of([chosen] * len(self.host.banks))
        for stage in range(num_stages):
            self._begin()
            yield PlannedFit(stage, "training", num_sites=len(self.host.banks) if stage == 0 else 0, also_stored=stored)
            for bank in self.host.banks.values():
                bank.freeze(bank.trainable_ids[: self.settings.num_frozen])

    def before_task(self, data: StageData, fit: FitFn) -> Growth:
        """Read the rows' features, and begin the task's routers; the pool grows in the first task alone."""
        del fit
        self._of_rows_SD = self.locating.features.of_rows(data.prompts, data.features)
        self._begin()
        return Growth(dict.fromkeys(self.host.banks, 0 if data.index else self.settings.num_experts))

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """Route by the rows' features under the newest routers."""
        feature_BD = self._of_rows_SD.to(batch[ROW].device)[batch[ROW]]
        newest = next(iter(self.routers.values())).num_tasks - 1
        with self._routed(RoutePlan.single(newest), feature_BD, batch):
            yield no_extra_loss

    @torch.no_grad()
    def most_used(self) -> dict[str, Tensor]:
        """Site to the ids of the experts in most of the rows' top k, without noise: the newest task's (num_frozen,)."""
        feature_SD = normalised(self._of_rows_SD)
        counts = {
            site: router.gate_of_newest(feature_SD, noisy=False).ne(0).sum(dim=0)
            for site, router in self.routers.items()
        }
        return {
            site: counts_E.sort(descending=True, stable=True).indices[: self.settings.num_frozen].sort().values.cpu()
            for site, counts_E in counts.items()
        }

    def after_task(self, data: StageData) -> Learned:
        """Freeze the routers and the experts used most, and fit the task's locator."""
        state, trained = state_of(self.host.banks, data.index), ledger.trained(self.host.banks)
        chosen = self.most_used()
        self._freeze(chosen)
        location = self.locating.learn_task(data, self._of_rows_SD)
        facts = {
            "trainable_parameters": trained.total.parameters,
            "router_parameters": trained.router.parameters,
            **location.facts,
        }
        tensors = {"routers": state.routers, "chosen": chosen, **location.tensors}
        return Learned({"experts": state.experts, **tensors} if state.experts else tensors, facts, location.seconds)

    def restore(self, tensors: Tensors) -> None:
        """Replace what was not frozen yet, add the next task's routers and locator, and freeze what it froze."""
        for bank in self.host.banks.values():
            bank.discard_trainable()
        restore(self.host.banks, TaskState(tensors.get("experts", {}), tensors["routers"]))
        self._freeze(tensors["chosen"])
        self.locating.restore(dict(tensors["locator"]))

    @contextmanager
    def answering(self, batch: Batch, task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        """Each sample's task, given or located, names its routers, which read the feature that it was located by."""
        feature_BD = self.locating.features.of(batch)
        located = self.locating.locate_feature(feature_BD) if task_B is None else Located.at(task_B)
        with self._routed(RoutePlan.of(located), feature_BD, batch):
            yield lambda: located if task_B is None else None

    def locate(self, batch: Batch) -> Located:
        """By the locators of all tasks so far."""
        return self.locating.locate(batch)

    def _begin(self) -> None:
        for site, router in self.routers.items():
            router.add_task(self.settings.num_experts, self.host.banks[site].anchor.device)

    def _freeze(self, chosen: Mapping[str, Tensor]) -> None:
        for site, bank in self.host.banks.items():
            bank.freeze(chosen[site].tolist())

    @contextmanager
    def _routed(self, plan: RoutePlan, feature_BD: Tensor, batch: Batch) -> Iterator[None]:
        plan.decided[FEATURE] = normalised(feature_BD)
        with self.host.context.use(plan, batch):
            yield
