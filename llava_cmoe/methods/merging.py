"""Merging: every task learns an adapter, and one that is merged from all answers, whatever the task.

    tau_i = B_i A_i, per linear                           always the product, never the factors
    arithmetic   c * sum_i tau_i                          (arXiv 2212.04089)
    average      mean_i tau_i
    TIES         of each tau_i the largest entries; per entry the sign with more mass; the mean of those that have it
                                                          (arXiv 2306.01708)
    MagMaX       adapters go on from each other; per entry the tau_i of largest size   (arXiv 2407.06322)

Sum and mean keep the adapters side by side, which is exact. What the other two make has full rank: its best
approximation by as many ranks as all adapters have together answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_cmoe.backbones.sites import linear_sites
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.constant import EveryExpert
from llava_cmoe.experts.stack import LoraPair
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
from llava_cmoe.records import Growth, Learned
from llava_cmoe.settings.methods.merging import MergingSettings

COEFFICIENTS = {"arithmetic": 0.4, "average": 1.0, "ties": 0.55, "magmax": 0.5}


class Merging(Method):
    """An adapter in every linear of the LLM: while a task learns its own, afterwards the merged one."""

    costs = Costs(
        trained="r * (I + O) per linear",
        stored="its adapter",
        answer="rank T r in every linear; merged into the weights, nothing",
    )

    host: ExpertHost

    def __init__(self, settings: MergingSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Make room for adapters beside every linear of the LLM's attention and FFNs."""
        del seed
        self.settings, self.model, self.processor = settings, model, processor
        self.host = install(
            model, linear_sites(model), lambda _: EveryExpert(), rank=settings.rank, alpha=settings.alpha
        )
        self._adapters: dict[str, list[LoraPair]] = {site: [] for site in self.host.banks}

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """An adapter everywhere for every task."""
        del num_grown
        for stage in range(num_stages):
            self.grow(seed=0)
            yield PlannedFit(stage, "training", num_sites=len(self.host.banks))

    def before_task(self, data: StageData, fit: FitFn) -> Growth:
        """Put the task's adapter in the merged one's place."""
        del fit
        self.grow(data.seed)
        return Growth(dict.fromkeys(self.host.banks, 1))

    def grow(self, seed: int) -> None:
        """An adapter as LoRA begins, or as the last task's ended (MagMaX)."""
        generator = torch.Generator().manual_seed(seed)
        for site, router in self.host.routers(EveryExpert).items():
            bank, earlier = self.host.banks[site], self._adapters[site]
            goes_on = self.settings.rule == "magmax" and earlier
            bank.drop(bank.ids)
            bank.grow(1, generator=generator, init_from={"linear": earlier[-1]} if goes_on else None)
            router.add_task()

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """The task's adapter alone."""
        with self.answering(batch):
            yield no_extra_loss

    def after_task(self, data: StageData) -> Learned:
        """Give the task's adapter away, and merge it with the others."""
        state, trained = state_of(self.host.banks, data.index), ledger.trained(self.host.banks)
        self._merge()
        return Learned({"experts": state.experts}, {"trainable_parameters": trained.total.parameters})

    def restore(self, tensors: Tensors) -> None:
        """Take the next task's adapter back, and merge it with the others."""
        for bank in self.host.banks.values():
            bank.drop(bank.ids)
        restore(self.host.banks, TaskState(tensors["experts"], {}))
        self._merge()

    @contextmanager
    def answering(self, batch: Batch, task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        """What is merged, whatever the task."""
        del task_B
        with self.host.context.use(RoutePlan.single(0), batch):
            yield lambda: None

    def _merge(self) -> None:
        """Remember the adapter that a bank holds, and put in its place what all make together."""
        for site, bank in self.host.banks.items():
            adapters, stack = self._adapters[site], bank.stacks["linear"]
            adapters.append(bank.expert(0)["linear"])
            bank.drop(bank.ids)
            stack.add(range(len(adapters)), merged(adapters, self.settings), like=bank.anchor)
            bank.freeze()


def merged(adapters: Sequence[LoraPair], settings: MergingSettings) -> LoraPair:
    """As many experts as there are adapters, whose sum is what the rule makes of these on one linear."""
    rule, num = settings.rule, len(adapters)
    factor = COEFFICIENTS[rule] if settings.coefficient is None else settings.coefficient
    if rule in ("arithmetic", "average"):
        share = factor / num if rule == "average" else factor
        a_ERI, b_EOR = (torch.cat([getattr(pair, name) for pair in adapters]) for name in ("a_ERI", "b_EOR"))
        return LoraPair(a_ERI, share * b_EOR)
    tau_EOI = torch.cat([pair.b_EOR.double() @ pair.a_ERI.double() for pair in adapters])
    joined_OI = factor * (ties(tau_EOI, settings.kept) if rule == "ties" else magmax(tau_EOI))
    rank = adapters[0].a_ERI.shape[1]
    u_OF, s_F, v_FI = torch.linalg.svd(joined_OI, full_matrices=False)
    root_F = s_F[: num * rank].sqrt()
    missing = num * rank - len(root_F)  # a small linear has fewer ranks than all adapters together
    a_FI = torch.nn.functional.pad(root_F[:, None] * v_FI[: len(root_F)], (0, 0, 0, missing))
    b_OF = torch.nn.functional.pad(u_OF[:, : len(root_F)] * root_F, (0, missing))
    like = adapters[0].a_ERI
    b_EOR = b_OF.view(len(b_OF), num, rank).movedim(1, 0)
    return LoraPair(a_FI.view(num, rank, -1).to(like), b_EOR.to(like))


def ties(tau_EOI: Tensor, kept: float) -> Tensor:
    """Trim, elect a sign per entry, and average what agrees with it (O, I)."""
    flat_EF = tau_EOI.flatten(1)
    num = max(1, round(kept * flat_EF.shape[1]))
    places_EN = flat_EF.abs().sort(dim=1, descending=True, stable=True).indices[:, :num]
    trimmed_EF = torch.zeros_like(flat_EF).scatter(1, places_EN, flat_EF.gather(1, places_EN))
    agrees_EF = (trimmed_EF.sign() == trimmed_EF.sum(dim=0).sign()) & (trimmed_EF != 0)
    mean_F = (trimmed_EF * agrees_EF).sum(dim=0) / agrees_EF.sum(dim=0).clamp_min(1)
    return mean_F.view(tau_EOI.shape[1:])


def magmax(tau_EOI: Tensor) -> Tensor:
    """Per entry the one of largest size (O, I); among equals the oldest."""
    return tau_EOI.gather(0, tau_EOI.abs().argmax(dim=0, keepdim=True))[0]
