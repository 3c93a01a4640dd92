"""RegLoRA, the regularisation of SEFE (arXiv 2505.02486): a new adapter stays small where earlier ones are large.

    y = W0 x + sum_{i <= t} (alpha / r) B_i A_i x
    L = L_LM + lambda * mean over linears of mean |(B_t A_t)[K]|      K: the largest entries of each earlier |B_i A_i|

Entries that are key elements of several tasks count as often. The paper merges each adapter into the weights after its
task, so that answers cost no more with many; kept apart they compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts.stack import LoraPair
from llava_cmoe.methods.base import Costs, FitFn, StageData, zero3_refusal
from llava_cmoe.methods.o_lora import OLora
from llava_cmoe.records import Growth
from llava_cmoe.settings.methods.reg_lora import RegLoraSettings


class RegLora(OLora):
    """Summed adapters, as O-LoRA has them, with a penalty on entries of the product instead of on shared directions."""

    costs = Costs(
        trained="r * (I + O) per linear",
        stored="its adapter",
        answer="T adapters",
    )

    settings: RegLoraSettings  # type: ignore[assignment]

    def __init__(self, settings: RegLoraSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Make room for adapters beside every linear of the LLM's attention and FFNs."""
        super().__init__(settings, model, processor, seed)  # type: ignore[arg-type]
        self._keys: dict[str, Tensor] = {}

    @classmethod
    def refusal(cls, settings: RegLoraSettings, zero_stage: int) -> str | None:  # type: ignore[override]
        """ZeRO-3 spreads the matrices whose product is held."""
        del settings
        return zero3_refusal(zero_stage, "reg_lora's penalty needs whole matrices")

    def before_task(self, data: StageData, fit: FitFn) -> Growth:
        """Find the key elements of all earlier tasks, and add the task's adapter."""
        self._keys = {}
        for site, bank in self.host.banks.items():
            found = [key_elements(bank.expert(place)["linear"], self.settings.key_share) for place in range(data.index)]
            if found:
                self._keys[site] = torch.cat(found)
        return super().before_task(data, fit)

    def penalty(self, output: ModelOutput) -> Tensor | float:
        """The weighted mean over linears; a scalar, 0 in the first task."""
        del output
        sizes = []
        for site, keys in self._keys.items():
            adapter = self.host.banks[site].stacks["linear"].trainable
            assert adapter is not None, "a task is being learned"
            sizes.append((adapter.B[0].mT @ adapter.A[0]).flatten()[keys].abs().mean())
        return self.settings.key_weight * torch.stack(sizes).mean() if sizes else 0.0


def key_elements(pair: LoraPair, share: float) -> Tensor:
    """Places of the largest entries of one adapter's |B A|, in the flattened (O, I); at least one."""
    size_F = (pair.b_EOR[0] @ pair.a_ERI[0]).abs().flatten()
    return size_F.sort(descending=True, stable=True).indices[: max(1, round(share * len(size_F)))]
