"""What a router is to a bank: a module that gives the gate of a site from its input and what is known of the pass.

One file per kind of router; whose turn it is stands in the plan. Which experts a gate weighs, `bank.py` knows.
Shape letters: B batch, T tokens, D hidden, E experts, K tasks mixed for one sample, C top-k slots of a token; S is B
(images or patches, where rows are these), or 1 where one plan serves the whole batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava_cmoe.experts.context import ForwardPass


class Gate(NamedTuple):
    """The gate of one forward pass over one site, and what balance loss and counts are derived from.

    A tuple, as ZeRO-3 hooks its gathering of the routers onto the tensors a module returns and looks into tuples only.

    Attributes:
        gate_BTE: weight of every expert for every token, in float32; (B, 1, E) or (1, 1, E) where tokens share it.
        ids: experts of the columns, ascending; None where column e is expert e.
        slots_BTC: the only columns that are not zero, for each token; None where that is not known.
        logit_ids: experts of the columns of what follows, alike: a merge changes those of the gate alone.
        logits_BTKE: router logits per mixed task; the float32 minimum where a router does not know the expert.
        top_BTKC: experts in the top-k slots.
        known_SKE: which experts each mixed task's router knows; none for task -1.
        weights_SK: weight of each mixed task.
        fixed: whether the plan alone decides it, so that no token and no prompt changes it.

    The five before the last are given by routers that choose a top k; balance loss and counts are derived from them.
    """

    gate_BTE: Tensor
    ids: Sequence[int] | None = None
    slots_BTC: Tensor | None = None
    logit_ids: Sequence[int] | None = None
    logits_BTKE: Tensor | None = None
    top_BTKC: Tensor | None = None
    known_SKE: Tensor | None = None
    weights_SK: Tensor | None = None
    fixed: bool = False

    @property
    def counted(self) -> Sequence[int] | None:
        """Experts that `counts` and `probability` are of, None where they are those from 0 on."""
        return self.ids if self.logits_BTKE is None else self.logit_ids

    def counts(self, mask_BT: Tensor | None) -> Tensor:
        """Top-k slots of non-pad tokens per expert: (E,) int64, no host sync."""
        if self.logits_BTKE is None or self.top_BTKC is None or self.known_SKE is None:
            return over_tokens((self.gate_BTE != 0).long(), mask_BT)
        chosen_BTKE = torch.zeros_like(self.logits_BTKE, dtype=torch.bool).scatter(-1, self.top_BTKC, True)
        counts_BTE = (chosen_BTKE & self.known_SKE.unsqueeze(1)).sum(dim=2)
        return over_tokens(counts_BTE, mask_BT)

    def probability(self, mask_BT: Tensor | None) -> Tensor:
        """Softmax over all of a router's own experts, summed over non-pad tokens: (E,), differentiable."""
        if self.logits_BTKE is None or self.known_SKE is None or self.weights_SK is None:
            return over_tokens(self.gate_BTE, mask_BT)
        share_BTKE = self.logits_BTKE.softmax(dim=-1) * self.known_SKE.unsqueeze(1)
        return over_tokens((share_BTKE * self.weights_SK[:, None, :, None]).sum(dim=2), mask_BT)


class Router(nn.Module, ABC):
    """Decides the gate of one site; what it learns of a task it gives away and takes back as named tensors."""

    @abstractmethod
    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """The gate of every token; None where no expert takes part, and the frozen module answers alone."""

    @abstractmethod
    def state_of(self, task: int) -> dict[str, Tensor]:
        """What a task's directory holds of this router, by name."""

    @abstractmethod
    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Names and shapes that `restore_next` wants for the next task, at a site that then has so many experts.

        Args:
            num_experts: of the site with the next task's.
            given: what there is to restore from, by name, where a shape is the task's own.
        """

    @abstractmethod
    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the next task back, trainable until it is frozen."""

    def freeze(self) -> None:
        """Train no more what is there."""
        self.requires_grad_(False)

    @abstractmethod
    def discard_trainable(self) -> None:
        """Forget what was added since the last `freeze()`."""


def over_tokens(value_BTE: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Sum over the non-pad tokens."""
    if mask_BT is None:
        return value_BTE.sum(dim=(0, 1))
    if mask_BT.shape not in (value_BTE.shape[:2], (len(value_BTE), 1)):
        raise ValueError(
            f"the plan's mask is {tuple(mask_BT.shape)}, the forward pass {tuple(value_BTE.shape[:2])}; "
            "observe whole forward passes, not cached decoding"
        )
    return (value_BTE * mask_BT.unsqueeze(-1)).sum(dim=(0, 1))
