"""R2MoE (arXiv 2507.13107): grow an expert everywhere, then remove it where the router hardly uses it.

    gate(c) = softmax over {null} + best old experts + {newest} of  sum_s c dR_s^T        null: logit 0, output 0
    y       = W0 x + sum_e gate_e (alpha / r) B_e A_e x
    L       = L_LM + lambda * sum over sites of |C_old dR_t|_F        distillation: old prompts keep their routes

A re-implementation after the description; constants are settings. What is a choice: experts sit on the LLM's FFNs; c is
the frozen model's feature of the prompt, so that no expert moves an old route, and what a task's router changes for the
prompts before it is exactly C_old dR_t, which is reported (`routing_drift`). C_old is kept as its Gram matrix, whose
size does not grow with the tasks:  |C dR^T|_F^2 = trace(dR C^T C dR^T).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_cmoe.backbones.sites import ffn_sites
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.additive import FEATURE, AdditiveRouter
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
    with_report,
    zero3_refusal,
)
from llava_cmoe.methods.frozen_features import FrozenFeatures, normalised
from llava_cmoe.records import Growth, Learned
from llava_cmoe.settings.methods.r2moe import R2moeSettings


class R2moe(Method):
    """One expert per task and site, some of them removed; task t's expert has the id t + 1, the null expert 0."""

    costs = Costs(
        trained="r * (I + O) per FFN linear, and T D per FFN",
        stored="its experts that are left, its router terms, a matrix D x D",
        answer="the experts of each FFN, and a pass for the feature",
    )

    host: ExpertHost

    def __init__(self, settings: R2moeSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Make room for experts in the LLM's FFNs."""
        del seed
        self.settings, self.model, self.processor = settings, model, processor
        width = int(model.config.get_text_config().hidden_size)
        self.host = install(
            model,
            ffn_sites(model),
            lambda _: AdditiveRouter(width, settings.num_old, settings.num_chosen),
            rank=settings.rank,
            alpha=settings.alpha,
        )
        self.routers = self.host.routers(AdditiveRouter)
        self.features = FrozenFeatures(model, processor, self.host.context, settings.layer, settings.feature)
        self.gram_DD = torch.zeros(width, width, device=model.device)
        self.num_prompts = 0
        self._of_rows_SD = torch.empty(0, width)

    @classmethod
    def refusal(cls, settings: R2moeSettings, zero_stage: int) -> str | None:
        """ZeRO-3 spreads the router that is distilled."""
        del settings
        return zero3_refusal(zero_stage, "r2moe's distillation needs whole routers")

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """An expert everywhere for every task, of which none is removed."""
        del num_grown
        gram = ledger.size_of([self.gram_DD, torch.tensor([0])])  # and how many prompts it is of
        for stage in range(num_stages):
            self.grow(seed=0)
            yield PlannedFit(stage, "training", num_sites=len(self.host.banks), also_stored=gram)
            self.host.freeze()

    def learn(self, data: StageData, fit: FitFn) -> Learned:
        """Grow everywhere, train, remove what is redundant, recover."""
        self._of_rows_SD = normalised(self.features.of_rows(data.prompts, data.features))
        self.grow(data.seed)
        trained = ledger.trained(self.host.banks)
        report = fit(data.samples, self.training_context, label="training")
        mean_gates = self.mean_gates()
        removed = [site for site, gate in mean_gates.items() if gate < self.settings.remove_below]
        self.remove(removed)
        if removed and self.settings.recovery_epochs and ledger.trainable(self.model).parameters:
            fit(data.samples, self.training_context, label="recovery", epochs=self.settings.recovery_epochs)
        facts = {
            "trainable_parameters": trained.total.parameters,
            "router_parameters": trained.router.parameters,
            "mean_gates": mean_gates,
            "routing_drift": self.drift(),
        }
        growth = Growth({site: 1 for site in self.host.banks if site not in removed})
        return with_report(Learned(self.after_task(data).tensors, facts), growth, report)

    def grow(self, seed: int) -> None:
        """A fresh expert and zero rows of the router at every site: all routes begin as they were."""
        generator = torch.Generator().manual_seed(seed)
        for site, router in self.routers.items():
            bank, num_tasks = self.host.banks[site], router.num_tasks
            bank.grow(1, generator=generator, first=num_tasks + 1)
            router.add_task(torch.zeros(num_tasks + 1, router.width, device=bank.anchor.device))

    def remove(self, sites: list[str]) -> None:
        """Take the newest expert away from some sites; a router without any expert left has nothing more to learn."""
        for site in sites:
            bank, router = self.host.banks[site], self.routers[site]
            bank.drop([router.num_tasks])
            router.remove_newest()
            if not bank.num_experts and router.delta is not None:
                router.delta.requires_grad_(False)

    @torch.no_grad()
    def mean_gates(self) -> dict[str, float]:
        """Site to the mean share of the newest expert over the task's own prompts, as in an answer."""
        gates = {site: router.gate(self._of_rows_SD, learning=False) for site, router in self.routers.items()}
        return {site: float(gate_SE[:, -1].mean()) for site, gate_SE in gates.items()}

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """Route by the rows' features, and add the distillation."""
        feature_BD = self._of_rows_SD.to(batch[ROW].device)[batch[ROW]]
        with self._routed(feature_BD, batch):
            yield self.distillation

    def distillation(self, output: ModelOutput) -> Tensor | float:
        """The weighted sum over sites of |C_old dR_t|_F."""
        del output
        norms = [self._change(router) for router in self.routers.values()]
        return self.settings.distillation_weight * torch.stack(norms).sum() if self.num_prompts else 0.0

    def _change(self, router: AdditiveRouter) -> Tensor:
        """|C_old dR_t|_F of the newest task at a site, over experts that are still there; a scalar."""
        assert router.delta is not None, "a task is being learned"
        delta_ED = router.delta.masked_fill(router.removed_E.unsqueeze(1), 0)
        square = ((delta_ED @ self.gram_DD.to(delta_ED.device)) * delta_ED).sum()
        return square.clamp_min(1e-12).sqrt()  # the root of 0 has no slope

    @torch.no_grad()
    def drift(self) -> float:
        """How far, at most over sites, the task moved an old prompt's logits: root of the mean square; 0 of none."""
        if not self.num_prompts:
            return 0.0
        most = max(float(self._change(router)) for router in self.routers.values())
        return most / math.sqrt(self.num_prompts)

    def after_task(self, data: StageData) -> Learned:
        """Freeze experts and router rows for good, and add the task's prompts to the Gram matrix."""
        state = state_of(self.host.banks, data.index)
        self.host.freeze()
        gram_DD, count = self._of_rows_SD.mT @ self._of_rows_SD, len(self._of_rows_SD)
        self._remember(gram_DD, count)
        routing = {"gram": gram_DD.cpu(), "count": torch.tensor([count])}
        tensors = {"routers": state.routers, "routing": routing}
        return Learned({"experts": state.experts, **tensors} if state.experts else tensors, {})

    def restore(self, tensors: Tensors) -> None:
        """Add the next task's experts and rows, and its prompts' Gram matrix."""
        restore(self.host.banks, TaskState(tensors.get("experts", {}), tensors["routers"]))
        self.host.freeze()
        self._remember(tensors["routing"]["gram"].to(self.model.device), int(tensors["routing"]["count"]))

    @contextmanager
    def answering(self, batch: Batch, task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        """Every sample is routed by its prompt's feature, whatever the task."""
        del task_B
        with self._routed(normalised(self.features.of(batch)), batch):
            yield lambda: None

    @contextmanager
    def _routed(self, feature_BD: Tensor, batch: Batch) -> Iterator[None]:
        plan = RoutePlan.single(0)
        plan.decided[FEATURE] = feature_BD
        with self.host.context.use(plan, batch):
            yield

    def _remember(self, gram_DD: Tensor, count: int) -> None:
        self.gram_DD, self.num_prompts = self.gram_DD + gram_DD, self.num_prompts + count
