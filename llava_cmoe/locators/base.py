"""What every locator offers: fit one task's features into tensors, then score any prompt under all known tasks.

Leaves to others where features come from (`backbones/features.py`) and what a verdict switches on (the method).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from llava_cmoe.records import Located


class Locator(Protocol):
    """A growing set of task models over one frozen feature space; what was fitted is never changed again."""

    @property
    def num_tasks(self) -> int:
        """Tasks known so far; they are numbered in the order of `add`."""
        ...

    def fit(self, feature_SD: Tensor, seed: int) -> dict[str, Tensor]:
        """Tensors that model one task, from the features of its S training prompts; changes nothing in the locator."""
        ...

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Make a fitted task known, as the next index."""
        ...

    def tensors_of(self, task: int) -> dict[str, Tensor]:
        """Exactly the tensors that `add` received for a task."""
        ...

    def locate(self, feature_BD: Tensor) -> Located:
        """Score a batch of prompts under every known task and choose one for each."""
        ...


def nearest_task(score_BN: Tensor, threshold_N: Tensor) -> Located:
    """Hard selection: the task with the lowest score, or -1 where even that one lies above its own threshold."""
    if score_BN.shape[1] == 0:
        nobody_B = torch.full(score_BN.shape[:1], -1, dtype=torch.long, device=score_BN.device)
        return Located(task_B=nobody_B, score_BN=score_BN)
    best_B, task_B = score_BN.min(dim=1)
    # Written as "known if below", so that a score that is not a number is unknown.
    known_B = best_B <= threshold_N[task_B]
    return Located(task_B=torch.where(known_B, task_B, -1), score_BN=score_BN)
