"""Probabilistic task locator (PTL): a small VAE per task on a frozen prompt feature, judged by reconstruction error.

What differs from a textbook VAE: it is never sampled from. Only the error at the mean latent counts: of reconstruction,
or, by a setting, the negative ELBO there. Network and fit are `reconstruction.py`, scores and thresholds `base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llava_cmoe.locators.reconstruction import ReconstructionLocator, tensor_names


class ProbabilisticTaskLocator(ReconstructionLocator):
    """One VAE per task; `posterior` gives the latent's mean and log variance side by side."""

    linears = ("encode", "posterior", "decode", "output")
    outputs_per_latent = 2
    names = tensor_names(linears)

    def error(self, models: Mapping[str, Tensor], x_BD: Tensor) -> Tensor:
        """error_NB: MSE per entry at the mean latent; plus beta KL where the negative ELBO is the error."""
        mean_NBZ, log_variance_NBZ = self.bottleneck(models, x_BD).chunk(2, dim=-1)
        error_NB = self.squared_error(models, mean_NBZ, x_BD).mean(dim=-1)
        if self._settings.error == "elbo":
            error_NB = error_NB + self._settings.beta * _kl(mean_NBZ, log_variance_NBZ)
        return error_NB

    def loss(self, networks: Mapping[str, Tensor], x_BD: Tensor, generator: torch.Generator) -> Tensor:
        """MSE (mean over entries) + beta KL (summed over the latent) at a drawn latent, averaged over the batch."""
        mean_NBZ, log_variance_NBZ = self.bottleneck(networks, x_BD).chunk(2, dim=-1)
        noise_NBZ = torch.randn(mean_NBZ.shape, generator=generator).to(x_BD.device)
        latent_NBZ = mean_NBZ + noise_NBZ * (0.5 * log_variance_NBZ).exp()
        squared_NBD = self.squared_error(networks, latent_NBZ, x_BD)
        return squared_NBD.mean() + self._settings.beta * _kl(mean_NBZ, log_variance_NBZ).mean()


def _kl(mean_NBZ: Tensor, log_variance_NBZ: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, 1)), summed over the latent: (N, B)."""
    return 0.5 * (mean_NBZ.square() + log_variance_NBZ.exp() - 1.0 - log_variance_NBZ).sum(dim=-1)
