"""Gaussian per task with a shrunk covariance: how likely is the feature under the task's mean and correlations?

A task has fewer features than a covariance has entries, and normalised features fill no more than a plane, so the
sample covariance S has no inverse. Shrinkage pulls it towards a scaled identity, (1 - w) S + w (tr S / D) 1, with w a
setting or after Ledoit and Wolf (2004, "A well-conditioned estimator for large-dimensional covariance matrices").
Storage grows as D^2 a task: 64 MB at width 4,096, where the default VAE takes 17 MB. Scores are `base.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from llava_cmoe.locators.base import Locator

VARIANCE_FLOOR = 1e-6
"""Added to the covariance's diagonal: identical features have none at all. Normalised features have variance 1."""


class GaussianLocator(Locator):
    """A density per task: `mean` (D) and `whiten` (D, D), upper triangular, with (x - mean) whiten ~ N(0, 1)."""

    names = ("mean", "whiten")

    def model(self, train_SD: Tensor, held_SD: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean and inverse Cholesky factor of the covariance, in float64 (hence on the CPU: not every GPU has it)."""
        del held_SD, generator
        x_SD = train_SD.cpu().double()
        mean_D = x_SD.mean(dim=0)
        covariance_DD = shrunk_covariance(x_SD - mean_D, self._settings.shrinkage)
        identity_DD = torch.eye(len(mean_D), dtype=torch.float64)
        cholesky_DD = torch.linalg.cholesky(covariance_DD + VARIANCE_FLOOR * identity_DD)
        whiten_DD = torch.linalg.solve_triangular(cholesky_DD, identity_DD, upper=False).mT
        model = {"mean": mean_D, "whiten": whiten_DD.contiguous()}
        return {name: tensor.float().to(self._device).unsqueeze(0) for name, tensor in model.items()}

    def error(self, models: Mapping[str, Tensor], x_BD: Tensor) -> Tensor:
        """error_NB: negative log-likelihood per entry.

        Under one task it ranks prompts as the Mahalanobis distance does; its log determinant, which a z-score cancels,
        is what makes raw errors of tight and wide tasks comparable.
        """
        white_NBD = torch.bmm(x_BD - models["mean"].unsqueeze(1), models["whiten"])
        log_scale_N1 = models["whiten"].diagonal(dim1=-2, dim2=-1).log().mean(dim=-1, keepdim=True)
        return 0.5 * white_NBD.square().mean(dim=-1) - log_scale_N1 + 0.5 * math.log(2 * math.pi)


def shrunk_covariance(x_SD: Tensor, weight: float | None) -> Tensor:
    """Covariance (D, D) of centred features, pulled towards a scaled identity.

    Args:
        x_SD: centred features.
        weight: of the identity; None for Ledoit and Wolf's b^2 / d^2, an estimate of the one with the least expected
            squared error.
    """
    num, width = x_SD.shape
    sample_DD = x_SD.mT @ x_SD / num
    target_DD = sample_DD.trace() / width * torch.eye(width, dtype=x_SD.dtype)
    if weight is None:
        d2 = (sample_DD - target_DD).square().sum()
        # Mean over k of |x_k x_k^T - S|^2, multiplied out: no matrix per feature.
        b2 = (x_SD.square().sum(dim=1).square().sum() / num - sample_DD.square().sum()) / num
        weight = float((b2 / d2).clamp(0, 1).nan_to_num(1.0))
    return (1 - weight) * sample_DD + weight * target_DD
