"""Probabilistic task locator (PTL): a small VAE per task on a frozen prompt feature, judged by reconstruction error.

What differs from a textbook VAE: it is never sampled from. Only the reconstruction error e_t at the mean latent counts,
z-scored with the held-out errors of its own task, zeta_t = (e_t - m_t) / s_t, because raw errors of two tasks cannot be
compared: one task's features may be harder to reconstruct than another's. All tasks' VAEs are stacked along a leading
axis N and evaluated together; fitting one task is the same code with N = 1.

    x = LayerNorm(feature)  ->  512  ->  mean, log variance (64 each)  ->  512  ->  x'        GELU in between

Where features come from, and what is done with a verdict, is left to others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from llava_cmoe.locators.base import nearest_task
from llava_cmoe.records import Located
from llava_cmoe.settings import LocatorSettings

FIT_BATCH = 64
"""Features per Adam step. On 2,000 synthetic features of width 224 (1.3 s a task on one core) 64 had the lowest
held-out error of 16, 64 and 256: 256 leaves too few steps before `epochs` run out, 16 takes twice as long."""

UNSEEN_QUANTILE, UNSEEN_FLOOR = 0.99, 3.0
"""A task rejects what scores worse than this quantile of its own held-out scores, but nothing below this many std."""

LINEARS = ("encode", "posterior", "decode", "output")
STATISTICS = ("error_mean", "error_std", "threshold")


class ProbabilisticTaskLocator:
    """One VAE per task over one feature space; the whole state is what `add` received, stacked.

    A task's tensors: `encode`, `posterior` (mean and log variance side by side), `decode` and `output`, each with a
    `weight` (in, out) and a `bias` (out), and the scalars `error_mean` m_t, `error_std` s_t, `threshold`; all float32.

    A batched product computes every matrix by itself, so a new task does not touch the scores of older ones. They keep
    their bits where BLAS gives a matrix to one thread; with two threads and width 1,024 the step from one task to two
    was seen to move the last bit (1e-7).
    """

    def __init__(self, settings: LocatorSettings, device: torch.device | str = "cpu") -> None:
        """Start with no task; fitting and scoring run on `device`, random numbers are always drawn on the CPU."""
        self._settings = settings
        self._device = torch.device(device)
        self._stacked: dict[str, Tensor] = {}

    @property
    def num_tasks(self) -> int:
        """Tasks known so far."""
        return len(self._stacked["threshold"]) if self._stacked else 0

    def fit(self, feature_SD: Tensor, seed: int) -> dict[str, Tensor]:
        """Fit one VAE to a task's features; the same features and seed give the same bytes.

        Raises:
            ValueError: features that are not finite, or too few to hold two out; a fit that diverged.
        """
        num_held = max(2, round(len(feature_SD) * self._settings.holdout))
        if num_held >= len(feature_SD):
            raise ValueError(f"a locator needs at least 3 features to fit and hold two out, got {len(feature_SD)}")
        if not bool(feature_SD.isfinite().all()):
            raise ValueError("features hold inf or nan; load the backbone in float32 or bfloat16")
        generator = torch.Generator().manual_seed(seed)
        x_SD = _normalised(feature_SD.to(self._device))
        order_S = torch.randperm(len(x_SD), generator=generator).to(self._device)
        held_SD = x_SD[order_S[:num_held]]
        vae = _fit_vae(x_SD[order_S[num_held:]], held_SD, self._settings, generator)

        # Early stopping read the same errors, so m_t is a little low, for all tasks alike.
        error_S = _reconstruction_error(vae, held_SD)[0]
        error_mean = error_S.mean()
        # Identical prompts have identical errors; eps keeps their score finite.
        error_std = error_S.std().clamp_min(torch.finfo(torch.float32).eps)
        worst = torch.quantile((error_S - error_mean) / error_std, UNSEEN_QUANTILE).clamp_min(UNSEEN_FLOOR)
        given = self._settings.unseen_threshold
        threshold = worst if given is None else torch.full_like(worst, given)
        statistics = dict(zip(STATISTICS, (error_mean, error_std, threshold), strict=True))
        return {name: tensor[0].clone() for name, tensor in vae.items()} | statistics

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Make a fitted task known, as the next index.

        Raises:
            ValueError: tensors of another locator, or of another width than the tasks before.
        """
        expected = {f"{linear}.{kind}" for linear in LINEARS for kind in ("weight", "bias")} | set(STATISTICS)
        if set(tensors) != expected:
            raise ValueError(f"not the tensors of a VAE locator: {sorted(set(tensors) ^ expected)} missing or unknown")
        for name, stacked in self._stacked.items():
            if tensors[name].shape != stacked.shape[1:]:
                raise ValueError(
                    f"locator of task {self.num_tasks}: {name} is {tuple(tensors[name].shape)}, earlier tasks have "
                    f"{tuple(stacked.shape[1:])}; keep backbone, locator.hidden and locator.latent within a run"
                )
        for name, tensor in tensors.items():
            new = tensor.to(self._device, torch.float32).unsqueeze(0)
            self._stacked[name] = torch.cat([self._stacked[name], new]) if name in self._stacked else new.clone()

    def tensors_of(self, task: int) -> dict[str, Tensor]:
        """The tensors that `add` received for a task, bit for bit."""
        if not 0 <= task < self.num_tasks:
            raise IndexError(f"task {task} is not known to the locator; it knows {self.num_tasks}")
        return {name: stacked[task].clone() for name, stacked in self._stacked.items()}

    @torch.no_grad()
    def locate(self, feature_BD: Tensor) -> Located:
        """Score prompts under every known task; the lowest z-score wins unless it lies above that task's threshold."""
        x_BD = _normalised(feature_BD.to(self._device))
        if not self._stacked:
            return nearest_task(x_BD.new_zeros(len(x_BD), 0), x_BD.new_zeros(0))
        mean_N1, std_N1 = self._stacked["error_mean"].unsqueeze(1), self._stacked["error_std"].unsqueeze(1)
        score_NB = (_reconstruction_error(self._stacked, x_BD) - mean_N1) / std_N1
        return nearest_task(score_NB.T.contiguous(), self._stacked["threshold"])


def _normalised(feature_BD: Tensor) -> Tensor:
    return functional.layer_norm(feature_BD.float(), feature_BD.shape[-1:])


def _linear(vaes: Mapping[str, Tensor], name: str, x_NBD: Tensor) -> Tensor:
    return torch.baddbmm(vaes[f"{name}.bias"].unsqueeze(1), x_NBD, vaes[f"{name}.weight"])


def _encode(vaes: Mapping[str, Tensor], x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latent of every x under every VAE, (N, B, Z) each."""
    x_NBD = x_BD.expand(len(vaes["encode.bias"]), *x_BD.shape)
    hidden_NBH = functional.gelu(_linear(vaes, "encode", x_NBD))
    mean_NBZ, log_variance_NBZ = _linear(vaes, "posterior", hidden_NBH).chunk(2, dim=-1)
    return mean_NBZ, log_variance_NBZ


def _decode(vaes: Mapping[str, Tensor], latent_NBZ: Tensor) -> Tensor:
    return _linear(vaes, "output", functional.gelu(_linear(vaes, "decode", latent_NBZ)))


@torch.no_grad()
def _reconstruction_error(vaes: Mapping[str, Tensor], x_BD: Tensor) -> Tensor:
    """error_NB: mean squared error per entry at the mean latent."""
    mean_NBZ, _ = _encode(vaes, x_BD)
    return (_decode(vaes, mean_NBZ) - x_BD).square().mean(dim=-1)


@torch.enable_grad()
def _fit_vae(
    train_SD: Tensor, held_SD: Tensor, settings: LocatorSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """Adam on MSE + beta KL; returns the weights (N = 1) of the epoch with the lowest held-out error."""
    vae = _initial_vae(train_SD.shape[1], settings, generator, train_SD.device)
    optimizer = torch.optim.Adam(vae.values(), lr=settings.learning_rate)
    best: dict[str, Tensor] = {}
    best_error, stale = math.inf, 0
    for _ in range(settings.epochs):
        order_S = torch.randperm(len(train_SD), generator=generator).to(train_SD.device)
        for start in range(0, len(order_S), FIT_BATCH):
            loss = _loss(vae, train_SD[order_S[start : start + FIT_BATCH]], settings.beta, generator)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        error = float(_reconstruction_error(vae, held_SD).mean())
        if error < best_error:
            best = {name: tensor.detach().clone() for name, tensor in vae.items()}
            best_error, stale = error, 0
        else:
            stale += 1
            if stale == settings.patience:
                break
    if not best:
        raise ValueError(f"fitting the locator diverged; lower locator.learning_rate (now {settings.learning_rate})")
    return best


def _loss(vae: Mapping[str, Tensor], x_BD: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """MSE (mean over entries) + beta KL(q(z|x) || N(0, 1)) (summed over the latent), both averaged over the batch."""
    mean_NBZ, log_variance_NBZ = _encode(vae, x_BD)
    noise_NBZ = torch.randn(mean_NBZ.shape, generator=generator).to(x_BD.device)
    x_again_NBD = _decode(vae, mean_NBZ + noise_NBZ * (0.5 * log_variance_NBZ).exp())
    kl_NB = 0.5 * (mean_NBZ.square() + log_variance_NBZ.exp() - 1.0 - log_variance_NBZ).sum(dim=-1)
    return (x_again_NBD - x_BD).square().mean() + beta * kl_NB.mean()


def _initial_vae(
    width: int, settings: LocatorSettings, generator: torch.Generator, device: torch.device
) -> dict[str, Tensor]:
    """Leaves for one VAE (N = 1), uniform in +-1/sqrt(in) as `nn.Linear` starts."""
    sizes = (width, settings.hidden, 2 * settings.latent), (settings.latent, settings.hidden, width)
    shapes = [pair for size in sizes for pair in pairwise(size)]
    vae = {}
    for linear, (num_in, num_out) in zip(LINEARS, shapes, strict=True):
        for name, shape in ((f"{linear}.weight", (1, num_in, num_out)), (f"{linear}.bias", (1, num_out))):
            start = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(num_in)
            vae[name] = start.to(device).requires_grad_()
    return vae
