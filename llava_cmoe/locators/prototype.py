"""Nearest prototype: a task is the mean of its features, the plainest locator there is (nearest class mean).

Nothing is fitted by gradients. Features come normalised, scores and thresholds are `base.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llava_cmoe.locators.base import Locator


class PrototypeLocator(Locator):
    """One mean feature per task: `mean` (D)."""

    names = ("mean",)

    def model(self, train_SD: Tensor, held_SD: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The mean of the normalised features."""
        del held_SD, generator
        return {"mean": train_SD.mean(dim=0, keepdim=True)}

    def error(self, models: Mapping[str, Tensor], x_BD: Tensor) -> Tensor:
        """error_NB: squared Euclidean distance to the mean, per entry."""
        return (x_BD - models["mean"].unsqueeze(1)).square().mean(dim=-1)
