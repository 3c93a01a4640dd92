"""R2MoE's router of one site: the sum of what every task added, over a null expert and one expert per task.

    logits(c) = sum_s c dR_s^T        column 0 is the null expert: logit 0, no expert behind it, the base model's share

It reads a feature of the prompt that the plan carries (`FEATURE`), so no expert can move a route. One decision per
sample, over the null expert, the best few old experts and, while learning, the newest.
Shape letters: B batch, D width of the feature, E columns (null and experts).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.routers.base import Gate, Router
from llava_cmoe.experts.routers.exact import exact_logits

FEATURE = "feature_BD"
"""Key of the plan's `decided` under which the prompts' feature is found."""


class AdditiveRouter(Router):
    """Buffer `frozen_ED`, what all earlier tasks added, and parameter `delta`, what the newest adds, each (E, D)."""

    frozen_ED: Tensor
    removed_E: Tensor
    delta: nn.Parameter | None

    def __init__(self, width: int, num_old: int, num_chosen: int) -> None:
        """No task yet.

        Args:
            width: of the feature.
            num_old: old experts that take part beside the newest while a task is learned.
            num_chosen: experts that take part in an answer.
        """
        super().__init__()
        self.width, self.num_old, self.num_chosen = width, num_old, num_chosen
        self.num_tasks = 0
        self.register_parameter("delta", None)
        self.register_buffer("frozen_ED", torch.zeros(0, width), persistent=False)
        self.register_buffer("removed_E", torch.zeros(0, dtype=torch.bool), persistent=False)

    def add_task(self, delta_ED: Tensor, kept: bool = True) -> None:
        """Begin a task's rows, one for each expert so far; `kept` says whether its own expert is still at this site."""
        self.delta = nn.Parameter(delta_ED.float())
        self.frozen_ED = pad(self.frozen_ED.to(delta_ED.device), (0, 0, 0, 1))
        self.removed_E = pad(self.removed_E.to(delta_ED.device), (0, 1), value=not kept)
        self.num_tasks += 1

    def remove_newest(self) -> None:
        """Give the newest task's expert no share from here on."""
        self.removed_E[-1] = True

    def logits(self, feature_BD: Tensor) -> Tensor:
        """Logits (B, E) of the null expert and of every expert; the float32 minimum where one was removed."""
        weight_ED = self.frozen_ED if self.delta is None else self.frozen_ED + self.delta
        logits_BE = exact_logits(feature_BD, weight_ED)
        return pad(logits_BE.masked_fill(self.removed_E, torch.finfo(torch.float32).min), (1, 0))

    def gate(self, feature_BD: Tensor, learning: bool) -> Tensor:
        """Softmax (B, E) over the null expert and those that take part."""
        with torch.autocast(feature_BD.device.type, enabled=False):
            logits_BE = self.logits(feature_BD.float())
            newest = logits_BE.shape[1] - 1
            candidates_BE = logits_BE[:, 1:newest] if learning else logits_BE[:, 1:]
            num = min(self.num_old if learning else self.num_chosen, candidates_BE.shape[1])
            place_BK = candidates_BE.sort(dim=1, descending=True, stable=True).indices[:, :num] + 1
            allowed_BE = torch.zeros_like(logits_BE, dtype=torch.bool).scatter(1, place_BK, True)
            allowed_BE[:, 0] = True
            if learning:
                allowed_BE[:, newest] = True
            return logits_BE.masked_fill(~allowed_BE, torch.finfo(torch.float32).min).softmax(dim=1)

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """One gate per sample (B, 1, E), decided once per prompt; no expert stands behind the null column."""
        if not self.num_tasks:
            return None
        decided, key = forward_pass.plan.decided, f"gate of {id(self)}"
        if forward_pass.is_prefill:
            decided[key] = self.gate(decided[FEATURE], learning=self.training).unsqueeze(1)
        return Gate(decided[key])

    def state_of(self, task: int) -> dict[str, Tensor]:
        """The newest task's rows, and whether its expert was kept; to be read before it is frozen."""
        assert self.delta is not None and task == self.num_tasks - 1, "the task that is being learned"
        kept = 1 - self.removed_E[-1:].long()
        return {"router": self.delta.detach().to("cpu", copy=True), "kept": kept.to("cpu")}

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Rows for all tasks up to the next one."""
        return {"router": (self.num_tasks + 1, self.width), "kept": (1,)}

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Append the task's rows."""
        self.add_task(tensors["router"].to(device, copy=True), bool(tensors["kept"]))

    def freeze(self) -> None:
        """Add the newest task's rows to those that never change again."""
        if self.delta is not None:
            self.frozen_ED = self.frozen_ED + self.delta.detach()
            self.delta = None

    def discard_trainable(self) -> None:
        """Forget the task that is not frozen yet."""
        if self.delta is not None:
            self.delta, self.num_tasks = None, self.num_tasks - 1
            self.frozen_ED, self.removed_E = self.frozen_ED[:-1], self.removed_E[:-1]
