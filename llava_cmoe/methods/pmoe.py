"""PMoE (arXiv 2407.21571): what tasks share is learned in shallow layers, what is theirs in deep ones.

    layer <  tau    y = W0 x + (alpha / r) B A x                          one LoRA, of the first task unless a setting
    layer >= tau    y = W0 x + sum_t g_t (alpha / r) B_t A_t x            one expert per task, old ones frozen
    between         g = softmax(W c)        c: mean over the prompt of what layer tau's first linear reads
    L = L_LM + beta * CE(g, task)

Only the abstract is public, so this follows the description; constants are settings. c is layer-normalised, and one g
serves all deep layers. It is known half-way through the pass that answers: there is no pass before it. All rows of W
learn with each task, on a small part of the earlier tasks' rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_cmoe.backbones.sites import linear_sites, llm_layers
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.init import linear_init
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.constant import EveryExpert
from llava_cmoe.experts.routers.mid_depth import DECIDED, GIVEN, LOGITS, MidDepthRouter, SharedGate
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
)
from llava_cmoe.methods.replay import kept_rows
from llava_cmoe.records import Growth, Learned, Located
from llava_cmoe.settings.methods.pmoe import PmoeSettings


class Pmoe(Method):
    """A shared adapter below depth tau, an expert per task above it, and one router between."""

    costs = Costs(
        trained="r * (I + O) per deep linear, and T D; the first task all linears",
        stored="its deep experts, and the router",
        answer="T deep experts and a shallow adapter; located in the same pass",
    )

    host: ExpertHost
    locates = True
    uses_past = True

    def __init__(self, settings: PmoeSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Make room for adapters in every linear of the LLM's attention and FFNs."""
        self.settings, self.model, self.processor, self.seed = settings, model, processor, seed
        num_layers = len(llm_layers(model))
        tau, sites = min(max(round(settings.depth * num_layers), 1), num_layers - 1), linear_sites(model)
        self.host = install(model, sites, lambda _: SharedGate(), rank=settings.rank, alpha=settings.alpha)
        banks = self.host.banks
        self.shallow = {site.name: banks[site.name] for site in sites if site.layer < tau}
        self.deep = {site.name: banks[site.name] for site in sites if site.layer >= tau}
        for bank in self.shallow.values():
            bank.router = EveryExpert()
        entrance = next(iter(self.deep.values()))  # the first linear that layer tau runs
        self.router = entrance.router = MidDepthRouter(entrance.hidden_size)
        self._task_of_row = torch.empty(0, dtype=torch.long)

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """Deep experts for every task; every earlier task is taken to have as many rows as the task itself."""
        del num_grown
        for stage in range(num_stages):
            self.grow(stage, seed=0)
            yield PlannedFit(stage, "training", len(self.deep), row_share=1 + stage * self.settings.replay)
            self._freeze()

    def learn(self, data: StageData, fit: FitFn) -> Learned:
        """Add an expert to the deep layers and a row to the router, and train on new rows and a few old ones."""
        self.grow(data.index, data.seed)
        trained = ledger.trained(self.host.banks)
        kept = [
            Subset(rows, kept_rows(len(rows), self.settings.replay, f"{self.seed}/{task}"))
            for task, rows in enumerate(data.past)
            if self.settings.replay
        ]
        sizes = [len(data.samples), *map(len, kept)]
        self._task_of_row = torch.tensor([data.index, *range(len(kept))]).repeat_interleave(torch.tensor(sizes))
        report = fit(ConcatDataset([data.samples, *kept]), self.training_context, label="training")
        facts = {
            "trainable_parameters": trained.total.parameters,
            "router_parameters": trained.router.parameters,
            "replayed_rows": sum(sizes[1:]),
        }
        growth = Growth({site: 1 for site, bank in self.host.banks.items() if bank.trainable_ids})
        return with_report(Learned(self.after_task(data).tensors, facts), growth, report)

    def grow(self, task: int, seed: int) -> None:
        """The first task's shared adapter; each task's own experts, and its row of the router."""
        generator = torch.Generator().manual_seed(seed)
        for bank in self.shallow.values() if task == 0 else ():
            bank.grow(1, generator=generator)
            assert isinstance(bank.router, EveryExpert)
            bank.router.add_task()
        for bank in self.deep.values():
            bank.grow(1, generator=generator)
        row_1D = linear_init((1, self.router.hidden_size), generator).to(self.model.device)
        old_ND = row_1D[:0] if self.router.weight is None else self.router.weight.detach()
        self.router.set_rows(torch.cat([old_ND, row_1D]))

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """Every sample by the router's own gate, and the cross-entropy of that with the task it is from."""
        plan = RoutePlan.single(0)

        def router_loss(output: ModelOutput) -> Tensor:
            del output
            logits_BN = plan.decided[LOGITS]
            task_B = self._task_of_row.to(logits_BN.device)[batch[ROW]]
            real_B = batch[ROW] >= 0  # a sample that only fills up a batch is of no task
            return self.settings.router_weight * F.cross_entropy(logits_BN[real_B], task_B[real_B])

        with self.host.context.use(plan, batch):
            yield router_loss

    def after_task(self, data: StageData) -> Learned:
        """Freeze the task's experts for good; the shared adapter after the first task, unless a setting goes on."""
        state = state_of(self.host.banks, data.index)
        self._freeze()
        return Learned({"experts": state.experts, "routers": state.routers}, {})

    def restore(self, tensors: Tensors) -> None:
        """Add the next task's experts, and replace the router and whatever else the task went on training."""
        for bank in self.shallow.values():
            bank.discard_trainable()
        restore(self.host.banks, TaskState(tensors["experts"], tensors["routers"]))
        self._freeze()

    @contextmanager
    def answering(self, batch: Batch, task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        """The router decides at prefill, for the whole answer; a given task's expert answers alone, -1 is no expert."""
        plan = RoutePlan.single(0)
        if task_B is None:
            with self.host.context.use(plan, batch):
                yield lambda: _located(plan.decided[DECIDED])
        else:
            known_B = (task_B >= 0).to(self.model.device)
            gate_BN = F.one_hot(task_B.to(self.model.device).clamp_min(0), self.router.num_tasks).float()
            plan.decided[GIVEN] = gate_BN * known_B.unsqueeze(1)
            with self.host.context.use(plan, batch):
                yield lambda: None

    def _freeze(self) -> None:
        banks = self.host.banks if self.settings.freeze_shallow else self.deep
        for bank in banks.values():
            bank.freeze()


def _located(gate_BN: Tensor) -> Located:
    """The task of the largest gate; a score is -log of the gate."""
    return Located.at(gate_BN.argmax(dim=1), -gate_BN.clamp_min(torch.finfo(gate_BN.dtype).tiny).log())
