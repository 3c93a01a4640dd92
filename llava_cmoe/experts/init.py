"""How new weights are drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in 1 / sqrt(fan-in): `nn.Linear`'s init of a weight, and LoRA's of A (Kaiming-uniform with a = sqrt(5)).

    Drawn on the CPU in float32, so that a seed gives the same experts on any device and in any precision.
    """
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
