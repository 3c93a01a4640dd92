"""Auto-encoder per task: the VAE's network without noise and without KL, the control that says what those two add.

Also how MoE-Adapters' DDAS tells tasks apart (arXiv 2403.11549). Network and fit are `reconstruction.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llava_cmoe.locators.reconstruction import ReconstructionLocator, tensor_names


class AutoEncoderLocator(ReconstructionLocator):
    """One auto-encoder per task; the bottleneck's output is the latent."""

    linears = ("encode", "bottleneck", "decode", "output")
    outputs_per_latent = 1
    names = tensor_names(linears)

    def error(self, models: Mapping[str, Tensor], x_BD: Tensor) -> Tensor:
        """error_NB: MSE per entry."""
        return self.squared_error(models, self.bottleneck(models, x_BD), x_BD).mean(dim=-1)

    def loss(self, networks: Mapping[str, Tensor], x_BD: Tensor, generator: torch.Generator) -> Tensor:
        """The mean error; nothing is drawn."""
        del generator
        return self.error(networks, x_BD).mean()
