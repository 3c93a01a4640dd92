"""What routers share whose tasks each have a few parameters of their own, by name: `keys_0`, `keys_1`, ..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_cmoe.experts.routers.base import Router


class TaskParts(Router):
    """Keeps, freezes and gives back each task's parameters; what they say is the subclass's."""

    parts: ClassVar[tuple[str, ...]]
    """Names of one task's parameters."""

    def __init__(self) -> None:
        """No task yet."""
        super().__init__()
        self.num_tasks = self.num_frozen = 0

    def part(self, name: str, task: int) -> Tensor:
        """One of a task's parameters."""
        return self.get_parameter(f"{name}_{task}")

    def add(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Append the next task's parameters, trainable."""
        for name in self.parts:
            parameter = nn.Parameter(tensors[name].float().to(device, copy=True))
            self.register_parameter(f"{name}_{self.num_tasks}", parameter)
        self.num_tasks += 1

    def state_of(self, task: int) -> dict[str, Tensor]:
        """The task's parameters."""
        return {name: self.part(name, task).detach().to("cpu", copy=True) for name in self.parts}

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Append the task's parameters."""
        self.add(tensors, device)

    def freeze(self) -> None:
        """Train no more what is there."""
        super().freeze()
        self.num_frozen = self.num_tasks

    def discard_trainable(self) -> None:
        """Forget the tasks since the last `freeze()`."""
        while self.num_tasks > self.num_frozen:
            self.num_tasks -= 1
            for name in self.parts:
                delattr(self, f"{name}_{self.num_tasks}")
