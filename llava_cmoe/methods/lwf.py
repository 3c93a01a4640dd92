"""LwF (arXiv 1606.09282): sequential LoRA, taught by itself as it was before the task, on the task's own inputs.

    L = L_LM + lambda * T^2 * mean over answer tokens of KL(softmax(z_before / T) || softmax(z / T))

The model before the task is the same backbone with the adapter as it was: a second forward pass of every batch, without
gradients. No row of an earlier task is kept. The first task has no teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW
from llava_cmoe.data.conversation import IGNORED, Processor
from llava_cmoe.experts.ledger import trained_parameters
from llava_cmoe.methods.base import Costs, ExtraLoss, FitFn, StageData, no_extra_loss, zero3_refusal
from llava_cmoe.methods.sequential_lora import SequentialLora
from llava_cmoe.records import Growth
from llava_cmoe.settings.methods.lwf import LwfSettings


class Lwf(SequentialLora):
    """One adapter that every task trains on, and, while it does, a copy of it from before."""

    costs = Costs(
        trained="r * (I + O) per linear",
        stored="the adapter",
        answer="one adapter",
    )

    def __init__(self, settings: LwfSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """No teacher yet."""
        super().__init__(settings, model, processor, seed)
        self.settings = settings
        self._before: dict[str, Tensor] = {}

    @classmethod
    def refusal(cls, settings: LwfSettings, zero_stage: int) -> str | None:
        """Under ZeRO-3 no weight is whole, so none can be replaced by what it was."""
        del settings
        return zero3_refusal(zero_stage, "lwf runs the model with its earlier weights")

    def before_task(self, data: StageData, fit: FitFn) -> Growth:
        """Remember the adapter as it is, from the second task on."""
        weights = trained_parameters(self.model) if data.index else {}
        self._before = {name: value.detach().clone() for name, value in weights.items()}
        return super().before_task(data, fit)

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """What the model before says of the batch, and how far the model now is from it."""
        if not self._before:
            yield no_extra_loss
            return
        before_NV = _answers(self._teach(batch), batch["labels"])

        def distillation(output: ModelOutput) -> Tensor:
            now_NV = _answers(output["logits"], batch["labels"])
            return self.settings.weight * distance(before_NV, now_NV, self.settings.temperature)

        yield distillation

    @torch.no_grad()
    def _teach(self, batch: Batch) -> Tensor:
        """Logits (B, T, V) of the model before the task; without dropout."""
        inputs = {name: value for name, value in batch.items() if name not in ("labels", ROW)}
        self.model.eval()  # the Trainer turns training on again
        logits_BTV: Tensor = functional_call(self.model, self._before, kwargs={**inputs, "use_cache": False}).logits
        return logits_BTV


def distance(before_NV: Tensor, now_NV: Tensor, temperature: float) -> Tensor:
    """T^2 * mean over tokens of KL(before || now), both softened by T; a scalar, 0 of no token."""
    if not len(before_NV):
        return now_NV.sum() * 0
    target_NV, log_NV = (before_NV / temperature).softmax(-1), (now_NV / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_NV, target_NV, reduction="batchmean")


def _answers(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The logits that predict learned tokens, (N, V) in float32."""
    return logits_BTV[:, :-1][labels_BT[:, 1:] != IGNORED].float()
