"""EWC (arXiv 1612.00796): sequential LoRA whose weights are held where they mattered to the tasks before.

    L = L_LM + lambda * sum_k F_k (theta_k - theta*_k)^2        F_k = mean over rows of (d log p(answer) / d theta_k)^2

The information of all tasks is one sum and theta* the weights after the last one ("online" EWC, arXiv 1805.06370), so
what is stored does not grow with the tasks. F is that of the labels (the empirical Fisher), of single rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.data import Subset
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_cmoe.data.batches import Batch, batches, share_of
from llava_cmoe.data.conversation import IGNORED, Processor
from llava_cmoe.experts.ledger import trainable, trained_parameters
from llava_cmoe.methods.base import Costs, ExtraLoss, PlannedFit, StageData, Tensors, zero3_refusal
from llava_cmoe.methods.sequential_lora import SequentialLora
from llava_cmoe.records import Learned
from llava_cmoe.settings.methods.ewc import EwcSettings


class Ewc(SequentialLora):
    """One adapter that every task trains on, and the importance of each of its weights so far."""

    costs = Costs(
        trained="r * (I + O) per linear",
        stored="the adapter, and the importance of each of its weights",
        answer="one adapter",
    )

    def __init__(self, settings: EwcSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Nothing matters yet."""
        super().__init__(settings, model, processor, seed)
        self.settings = settings
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    @classmethod
    def refusal(cls, settings: EwcSettings, zero_stage: int) -> str | None:
        """ZeRO-3 spreads the weights that the penalty compares."""
        del settings
        return zero3_refusal(zero_stage, "ewc's penalty needs whole weights")

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """The one adapter for every task; importances are as many as weights."""
        for fit in super().planned_fits(num_stages, num_grown):
            yield replace(fit, also_stored=trainable(self.model))

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """The plain model, and the penalty."""
        del batch
        weights = trained_parameters(self.model)

        def penalty(output: ModelOutput) -> Tensor | float:
            del output
            terms = [
                (self.importance[name] * (weights[name] - self.anchor[name]).square()).sum() for name in self.anchor
            ]
            return self.settings.weight * torch.stack(terms).sum() if terms else 0.0

        yield penalty

    def after_task(self, data: StageData) -> Learned:
        """Add the task's information to the sum, and hold on to the weights as they are now."""
        learned, found = super().after_task(data), self.fisher(data)
        self._anchor({name: self.settings.decay * self.importance.get(name, 0) + found[name] for name in found})
        importance = {name: value.to("cpu", copy=True) for name, value in self.importance.items()}
        return Learned({**learned.tensors, "importance": importance}, learned.facts)

    def fisher(self, data: StageData) -> dict[str, Tensor]:
        """Mean over rows of the squared gradient of a row's log-likelihood, by weight; processes share the rows."""
        generator = torch.Generator().manual_seed(data.seed)
        chosen = torch.randperm(len(data.samples), generator=generator)[: self.settings.fisher_rows].tolist()
        weights = trained_parameters(self.model)
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for row in batches(share_of(Subset(data.samples, chosen)), self.processor, 1, self.model.device):
            num_learned = (row["labels"][:, 1:] != IGNORED).sum()
            log_likelihood = self.model(**row, use_cache=False).loss * num_learned
            for name, slope in zip(weights, torch.autograd.grad(log_likelihood, list(weights.values())), strict=True):
                total[name] += slope.square()
        return {name: reduce(value, "sum") / len(chosen) for name, value in total.items()}

    def restore(self, tensors: Tensors) -> None:
        """Replace adapter and importance by those of the next task."""
        super().restore(tensors)
        self._anchor({name: value.to(self.model.device) for name, value in tensors["importance"].items()})

    def _anchor(self, importance: dict[str, Tensor]) -> None:
        self.importance = importance
        self.anchor = {name: value.detach().clone() for name, value in trained_parameters(self.model).items()}
