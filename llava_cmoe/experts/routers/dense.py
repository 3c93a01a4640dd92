"""A router that leaves no expert out: the softmax over all of them is the gate, as in MoELoRA.

There is no top k that a rounding could tip, so logits are plain float32 products where `per_task.py` takes exact ones.
Shape letters: B batch, T tokens, D hidden, E experts.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.routers.base import Gate
from llava_cmoe.experts.routers.per_task import TaskRouters


class DenseRouter(TaskRouters):
    """One router for all tasks, number 0, over all experts."""

    def __init__(self, hidden_size: int) -> None:
        """No router yet."""
        super().__init__(hidden_size, top_k=sys.maxsize)

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """softmax(W h), in float32 whatever autocast says."""
        del forward_pass
        weight_ED = self.weight(0)
        assert weight_ED is not None, "there are experts, and they have a router"
        with torch.autocast(h_BTD.device.type, enabled=False):
            return Gate(F.linear(h_BTD.float(), weight_ED).softmax(dim=-1), self.known[0])
