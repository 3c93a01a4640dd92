"""Probabilistic PCA per task: a Gaussian whose covariance has K directions of its own and one variance for the rest.

It is the VAE with a linear decoder at its optimum, which has a closed form (Tipping and Bishop 1999, "Probabilistic
principal component analysis"; Lucas et al. 2019, "Don't blame the ELBO!"): nothing to train, no seed, and errors that
are likelihoods, so that those of two tasks can be compared as they are (`score: raw`). Storage grows as D K a task:
1 MB at width 4,096 and 64 directions, where the Gaussian takes 64 MB. Scores are `base.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from llava_cmoe.locators.base import Locator

VARIANCE_FLOOR = 1e-6
"""Least variance of any direction: identical features have none at all. Normalised features have variance 1."""


class PpcaLocator(Locator):
    """A density per task: `mean` (D), `directions` (D, K) with `variances` (K), `residual` variance elsewhere."""

    names = ("mean", "directions", "variances", "residual")

    def model(self, train_SD: Tensor, held_SD: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The maximum of the likelihood, in float64 (hence on the CPU: not every GPU has it).

        A task with too few features for `latent` directions has as many zeros among them, of the residual variance, so
        that tasks can be stacked.
        """
        del held_SD, generator
        x_SD = train_SD.cpu().double()
        num, width = x_SD.shape
        mean_D = x_SD.mean(dim=0)
        found = min(self._settings.latent, num - 2, width - 1)  # one at least is left for the residual
        directions_DK, variances_K = widest_directions(x_SD - mean_D, max(found, 0))
        total = (x_SD - mean_D).square().sum() / num
        residual = ((total - variances_K.sum()) / (width - len(variances_K))).clamp_min(VARIANCE_FLOOR)
        missing = self._settings.latent - len(variances_K)
        model = {
            "mean": mean_D,
            "directions": torch.nn.functional.pad(directions_DK, (0, missing)),
            "variances": torch.cat([variances_K.clamp_min(float(residual)), residual.expand(missing)]),
            "residual": residual,
        }
        return {name: tensor.float().contiguous().to(self._device).unsqueeze(0) for name, tensor in model.items()}

    def error(self, models: Mapping[str, Tensor], x_BD: Tensor) -> Tensor:
        """error_NB: negative log-likelihood per entry."""
        centred_NBD = x_BD - models["mean"].unsqueeze(1)
        inside_NBK = torch.bmm(centred_NBD, models["directions"])
        outside_NBD = centred_NBD - torch.bmm(inside_NBK, models["directions"].mT)
        variances_NK, residual_N1 = models["variances"], models["residual"].unsqueeze(1)
        square_NB = (inside_NBK.square() / variances_NK.unsqueeze(1)).sum(dim=-1)
        square_NB = square_NB + outside_NBD.square().sum(dim=-1) / residual_N1
        width, rank = models["directions"].shape[1:]
        log_volume_N1 = variances_NK.log().sum(dim=1, keepdim=True) + (width - rank) * residual_N1.log()
        return 0.5 * ((square_NB + log_volume_N1) / width + math.log(2 * math.pi))


def widest_directions(x_SD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The orthonormal directions (D, K) of the largest variance, and those variances (K), of centred features.

    From the smaller of the two products of the features with themselves, which have the same eigenvalues.
    """
    num, width = x_SD.shape
    if num < width:
        values, vectors_SK = _largest(x_SD @ x_SD.mT / num, rank)
        directions_DK = x_SD.mT @ vectors_SK
        return directions_DK / directions_DK.norm(dim=0).clamp_min(torch.finfo(x_SD.dtype).tiny), values
    values, directions_DK = _largest(x_SD.mT @ x_SD / num, rank)
    return directions_DK, values


def _largest(symmetric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues and their vectors, as columns."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
