"""Routers that learn nothing: every expert at full weight, the expert of each sample's task, or now one, now the other.

Shape letters: B batch, T tokens, D hidden, E experts, K tasks mixed for one sample; S is B, or 1 where one plan serves
the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.routers.base import Gate, Router


class ConstantRouter(Router):
    """What routers without weights share: they count the tasks, and have nothing to store."""

    def __init__(self) -> None:
        """No task yet."""
        super().__init__()
        self.num_tasks = self.num_frozen = 0

    def add_task(self) -> None:
        """One task more, and with it one expert."""
        self.num_tasks += 1

    def state_of(self, task: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Nothing."""
        return {}

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """One task more."""
        self.add_task()

    def freeze(self) -> None:
        """Keep the tasks so far."""
        self.num_frozen = self.num_tasks

    def discard_trainable(self) -> None:
        """Forget the tasks since the last `freeze()`."""
        self.num_tasks = self.num_frozen


class EveryExpert(ConstantRouter):
    """The sum of all experts, whatever the task."""

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """Ones (1, 1, E)."""
        ones_11E = h_BTD.new_ones(1, 1, self.num_tasks, dtype=torch.float32)
        return Gate(ones_11E, fixed=True) if self.num_tasks else None


class OwnExpert(ConstantRouter):
    """Task t's samples use expert t alone; a mixture of tasks is the mixture of their experts."""

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """Weights (S, 1, E); of a plan of one task only that expert's column, so that nothing else is computed."""
        plan = forward_pass.plan
        if plan.max_task < 0:
            return None
        if plan.max_task >= self.num_tasks:
            raise ValueError(f"the route plan names task {plan.max_task}, but {self.num_tasks} tasks have experts here")
        tasks_SK, weights_SK = forward_pass.rows()
        if tasks_SK.numel() == 1:
            return Gate(weights_SK.unsqueeze(1), ids=(plan.max_task,), fixed=True)
        gate_SE = weights_SK.new_zeros(len(tasks_SK), plan.max_task + 1)
        return Gate(gate_SE.scatter_add(1, tasks_SK.clamp_min(0), weights_SK).unsqueeze(1), fixed=True)


class EveryLearned(OwnExpert):
    """While a task is learned its own expert alone; in answers the sum of all, and of task -1 none."""

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """Weights (S, 1, E), the same for all experts."""
        if self.training or forward_pass.plan.max_task < 0:
            return super().forward(h_BTD, forward_pass)
        tasks_SK, weights_SK = forward_pass.rows()
        known_S1 = weights_SK.masked_fill(tasks_SK < 0, 0).sum(dim=1, keepdim=True)
        return Gate(known_S1.unsqueeze(1).expand(-1, 1, self.num_tasks), fixed=True)
