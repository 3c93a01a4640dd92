"""O-LoRA (arXiv 2310.14152): every task learns in a subspace orthogonal to those of the tasks before.

    y = W0 x + sum_{i <= t} (alpha / r) B_i A_i x        L = L_LM + lambda * sum_{i < t} sum |A_t A_i^T|

Earlier adapters stay in the forward pass and are frozen. No task is ever located: all answer with the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_cmoe.backbones.sites import linear_sites
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.constant import EveryExpert
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
    zero3_refusal,
)
from llava_cmoe.records import Growth, Learned
from llava_cmoe.settings.methods.o_lora import OLoraSettings


class OLora(Method):
    """One adapter per task in every linear of the LLM, summed."""

    costs = Costs(
        trained="r * (I + O) per linear",
        stored="its adapter",
        answer="T adapters",
    )

    host: ExpertHost

    def __init__(self, settings: OLoraSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Make room for adapters beside every linear of the LLM's attention and FFNs."""
        del seed
        self.settings, self.model, self.processor = settings, model, processor
        self.host = install(
            model, linear_sites(model), lambda _: EveryExpert(), rank=settings.rank, alpha=settings.alpha
        )

    @classmethod
    def refusal(cls, settings: OLoraSettings, zero_stage: int) -> str | None:
        """ZeRO-3 spreads the matrices that the penalty multiplies."""
        del settings
        return zero3_refusal(zero_stage, "o_lora's penalty needs whole matrices")

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """An adapter everywhere for every task."""
        del num_grown
        for stage in range(num_stages):
            self.grow(seed=0)
            yield PlannedFit(stage, "training", num_sites=len(self.host.banks))
            self.host.freeze()

    def before_task(self, data: StageData, fit: FitFn) -> Growth:
        """Add the task's adapter."""
        del fit
        self.grow(data.seed)
        return Growth(dict.fromkeys(self.host.banks, 1))

    def grow(self, seed: int) -> None:
        """An adapter as LoRA begins: A random, B zero."""
        generator = torch.Generator().manual_seed(seed)
        for site, router in self.host.routers(EveryExpert).items():
            self.host.banks[site].grow(1, generator=generator)
            router.add_task()

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """All adapters in the sum, and the penalty on what the new one shares with the others."""
        with self.answering(batch):
            yield self.penalty

    def penalty(self, output: ModelOutput) -> Tensor | float:
        """The weighted sum over linears and earlier tasks of |A_t A_i^T|, entry by entry; a scalar."""
        del output
        terms = [torch.zeros((), device=self.model.device)]
        for bank in self.host.banks.values():
            for stack in bank.stacks.values():
                if stack.frozen is not None and stack.trainable is not None:
                    product_FR = stack.frozen.A.flatten(0, 1) @ stack.trainable.A.flatten(0, 1).mT
                    terms.append(product_FR.abs().sum())
        return self.settings.orthogonal_weight * torch.stack(terms).sum()

    def after_task(self, data: StageData) -> Learned:
        """Freeze the adapter for good."""
        state, trained = state_of(self.host.banks, data.index), ledger.trained(self.host.banks)
        self.host.freeze()
        return Learned({"experts": state.experts}, {"trainable_parameters": trained.total.parameters})

    def restore(self, tensors: Tensors) -> None:
        """Add the next task's adapter as it was committed."""
        restore(self.host.banks, TaskState(tensors["experts"], {}))
        self.host.freeze()

    @contextmanager
    def answering(self, batch: Batch, task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        """The sum of all adapters, whatever the task."""
        del task_B
        with self.host.context.use(RoutePlan.single(0), batch):
            yield lambda: None
