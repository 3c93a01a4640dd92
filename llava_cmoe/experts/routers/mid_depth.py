"""PMoE's router: one decision per sample, half-way through the network, that all deeper sites share.

The first deep site's router pools its input over the prompt and decides at prefill; the others, and every step of
decoding, read what it decided from the plan. Shape letters: B batch, T tokens, D hidden, N tasks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.routers.base import Gate, Router
from llava_cmoe.experts.routers.exact import exact_logits

GIVEN, DECIDED, LOGITS = "given_BN", "gate_BN", "logits_BN"
"""Keys of the plan's `decided`: a gate that takes the router's place; what the router decided, and from what."""


class SharedGate(Router):
    """Reads the decision; learns nothing."""

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """The gate of each sample (B, 1, N)."""
        return Gate(decided(forward_pass).unsqueeze(1), fixed=GIVEN in forward_pass.plan.decided)

    def state_of(self, task: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Nothing."""
        return {}

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Nothing."""

    def discard_trainable(self) -> None:
        """Nothing."""


class MidDepthRouter(SharedGate):
    """Makes the decision: g = softmax(W c), c the mean input of its site over the prompt, W a row per task."""

    weight: nn.Parameter | None

    def __init__(self, hidden_size: int) -> None:
        """No task yet."""
        super().__init__()
        self.hidden_size = hidden_size
        self.register_parameter("weight", None)

    @property
    def num_tasks(self) -> int:
        """Rows of W."""
        return 0 if self.weight is None else len(self.weight)

    def set_rows(self, weight_ND: Tensor) -> None:
        """Replace W, trainable."""
        self.weight = nn.Parameter(weight_ND.float())

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """Decide, unless this pass is a step of decoding or the gate is given; then as the others."""
        if self.weight is not None and forward_pass.is_prefill and GIVEN not in forward_pass.plan.decided:
            with torch.autocast(h_BTD.device.type, enabled=False):
                c_BD = pooled(h_BTD, forward_pass.prompt_mask_BT)
                logits_BN = exact_logits(c_BD, self.weight)
            # Under gradient checkpointing this runs again in backward, and decides the same again.
            forward_pass.plan.decided.update({LOGITS: logits_BN, DECIDED: logits_BN.softmax(dim=1)})
        return super().forward(h_BTD, forward_pass)

    def state_of(self, task: int) -> dict[str, Tensor]:
        """All rows as they are now: the next task trains all of them."""
        assert self.weight is not None, "a task is learned"
        return {"router": self.weight.detach().to("cpu", copy=True)}

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """A row per task."""
        return {"router": (self.num_tasks + 1, self.hidden_size)}

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Replace all rows."""
        self.set_rows(tensors["router"].to(device, copy=True))


def decided(forward_pass: ForwardPass) -> Tensor:
    """The gate (B, N) that holds for the samples of a pass."""
    found = forward_pass.plan.decided
    return found[GIVEN] if GIVEN in found else found[DECIDED]


def pooled(h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the masked tokens (B, D) in float32, layer-normalised; summed in float64, so in any order alike."""
    sum_BD = h_BTD.masked_fill(~mask_BT.unsqueeze(-1), 0).sum(dim=1, dtype=torch.float64)
    mean_BD = (sum_BD / mask_BT.sum(dim=1, keepdim=True).clamp_min(1)).float()
    return nn.functional.layer_norm(mean_BD, mean_BD.shape[-1:])
