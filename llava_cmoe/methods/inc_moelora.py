"""Incremental MoELoRA: every task adds experts and router rows in each FFN, old ones are frozen, and tokens choose.

    y = W0 x + sum_{e in top k} w_e (alpha / r) B_e A_e x        w = softmax over the chosen of R h        `widened.py`
    L = L_LM + lambda * mean over FFNs of n * sum_{e new} F_e P_e

The baseline that LLaVA-DyMoE (arXiv 2603.27481) starts from. F is the share of the new experts' slots that an expert
gets, P its mean probability among them. Nobody locates a task: whatever is learned later can draw old tokens away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_cmoe.backbones.sites import ffn_sites
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.init import linear_init
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.widened import Scores, WidenedRouter
from llava_cmoe.experts.state import TaskState, restore, state_of
from llava_cmoe.experts.surgery import ExpertHost, install
from llava_cmoe.methods.base import Costs, DeferredLocation, ExtraLoss, FitFn, Method, PlannedFit, StageData, Tensors
from llava_cmoe.records import Growth, Learned
from llava_cmoe.settings.methods.inc_moelora import GrowingExperts


class IncMoeLora(Method):
    """Experts and rows per task in every FFN, under one router that grows."""

    costs = Costs(
        trained="N r * (I + O) per FFN linear, and N D per FFN, of N new experts",
        stored="its experts and router rows",
        answer="top k of N T experts of each FFN",
    )

    host: ExpertHost

    def __init__(self, settings: GrowingExperts, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Make room for experts in every FFN of the LLM."""
        del seed
        self.settings, self.model, self.processor = settings, model, processor
        self.host = install(model, ffn_sites(model), self.router, rank=settings.rank, alpha=settings.alpha)
        self.routers = self.host.routers(WidenedRouter)

    def router(self, width: int) -> WidenedRouter:
        """An empty router for a site of this width."""
        return WidenedRouter(width, self.settings.top_k)

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """New experts everywhere for every task."""
        del num_grown
        for stage in range(num_stages):
            self.grow(seed=0)
            yield PlannedFit(stage, "training", num_sites=len(self.host.banks))
            self.host.freeze()

    def before_task(self, data: StageData, fit: FitFn) -> Growth:
        """Add the task's experts and rows."""
        del fit
        self.grow(data.seed)
        return Growth(dict.fromkeys(self.host.banks, self.settings.num_new))

    def grow(self, seed: int) -> None:
        """Experts as LoRA begins, rows as `nn.Linear` draws them."""
        generator = torch.Generator().manual_seed(seed)
        for site, router in self.routers.items():
            bank = self.host.banks[site]
            bank.grow(self.settings.num_new, generator=generator)
            router.add_task(linear_init((self.settings.num_new, router.width), generator).to(bank.anchor.device))

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """All experts under the router, and the losses of what it decided."""
        mask_BT = batch["attention_mask"].to(self.model.device).float()
        # Over what a process has on average: gradients that are averaged over processes are then those of one.
        weight_BT = mask_BT / reduce(mask_BT.sum(), "mean").clamp_min(1)

        def losses(output: ModelOutput) -> Tensor:
            del output
            return torch.stack([self.loss_of(router.take(), weight_BT) for router in self.routers.values()]).mean()

        with self.answering(batch):
            yield losses

    def loss_of(self, scores: Scores, weight_BT: Tensor) -> Tensor:
        """What one site adds to the loss; `weight_BT` makes a mean over tokens of a sum."""
        return self.settings.balance_weight * balance(scores, weight_BT)

    def after_task(self, data: StageData) -> Learned:
        """Freeze the task's experts and rows for good."""
        state, trained = state_of(self.host.banks, data.index), ledger.trained(self.host.banks)
        self.host.freeze()
        facts = {"trainable_parameters": trained.total.parameters, "router_parameters": trained.router.parameters}
        return Learned({"experts": state.experts, "routers": state.routers}, facts)

    def restore(self, tensors: Tensors) -> None:
        """Add the next task's experts and rows as they were committed."""
        restore(self.host.banks, TaskState(tensors["experts"], tensors["routers"]))
        self.host.freeze()

    @contextmanager
    def answering(self, batch: Batch, task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        """Every token chooses among all experts, whatever the task."""
        del task_B
        with self.host.context.use(RoutePlan.single(0), batch):
            yield lambda: None


def balance(scores: Scores, weight_BT: Tensor) -> Tensor:
    """N * sum_e F_e P_e over the n new experts; 0 where no token chose one. F is of this process's tokens."""
    new_BTN = scores.logits_BTE[..., scores.num_old :]
    chosen_BTE = torch.zeros_like(scores.logits_BTE).scatter(-1, scores.slots_BTC, 1)
    slots_N = (chosen_BTE[..., scores.num_old :] * weight_BT.unsqueeze(-1)).sum(dim=(0, 1))
    probability_N = (new_BTN.softmax(dim=-1) * weight_BT.unsqueeze(-1)).sum(dim=(0, 1))
    return len(slots_N) * (slots_N / slots_N.sum().clamp_min(1e-12) * probability_N).sum()
