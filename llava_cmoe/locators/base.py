"""What every locator does: fit one task's features into tensors, then score any prompt under all known tasks.

A kind of locator says two things, what models a task and how large a prompt's error under it is; everything else is
here. Raw errors of two tasks cannot be compared, as one task's features may be harder to model than another's, so an
error counts in units of its task's own held-out errors: zeta_t = (e_t - m_t) / s_t. All tasks' models are stacked along
a leading axis N and evaluated together; fitting one task is the same code with N = 1.

    x = LayerNorm(feature)  ->  error_NB  ->  score_BN  ->  lowest below its task's threshold, or none

Leaves to others where features come from (`backbones/features.py`) and what a verdict switches on (the method).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from llava_cmoe.records import Located
from llava_cmoe.settings.locators import LocatorSettings

UNSEEN_QUANTILE, UNSEEN_FLOOR = 0.99, 3.0
"""A task rejects what scores worse than this quantile of its own held-out scores, but nothing below this many std."""

STATISTICS = ("error_mean", "error_std", "threshold")


class Locator(ABC):
    """A growing set of task models over one frozen feature space; what was fitted is never changed again.

    The whole state is what `add` received, stacked: float32 tensors of the kind's own names, and the scalars
    `error_mean` m_t, `error_std` s_t and `threshold`, the last one in units of the score.

    A batched product computes every matrix by itself, so a new task does not touch the scores of older ones. They keep
    their bits where BLAS gives a matrix to one thread; with two threads and width 1,024 the step from one task to two
    was seen to move the last bit (1e-7).
    """

    names: ClassVar[tuple[str, ...]]
    """Names of the tensors that model a task."""

    def __init__(self, settings: LocatorSettings, device: torch.device | str = "cpu") -> None:
        """Start with no task; fitting and scoring run on `device`, random numbers are always drawn on the CPU."""
        self._settings = settings
        self._device = torch.device(device)
        self._stacked: dict[str, Tensor] = {}

    @abstractmethod
    def model(self, train_SD: Tensor, held_SD: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One task's model with a leading axis of 1; the held-out features may say when to stop, nothing else."""

    @abstractmethod
    def error(self, models: Mapping[str, Tensor], x_BD: Tensor) -> Tensor:
        """error_NB: how badly each of N stacked models fits each feature, per entry of the feature."""

    @property
    def num_tasks(self) -> int:
        """Tasks known so far; they are numbered in the order of `add`."""
        return len(self._stacked["threshold"]) if self._stacked else 0

    @torch.no_grad()
    def fit(self, feature_SD: Tensor, seed: int) -> dict[str, Tensor]:
        """Tensors that model one task, from the features of its S training prompts; changes nothing in the locator.

        The same features and seed give the same bytes.

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
        model = self.model(x_SD[order_S[num_held:]], held_SD, generator)
        statistics = self._statistics(self.error(model, held_SD)[0])
        return {name: tensor[0].clone() for name, tensor in model.items()} | statistics

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Make a fitted task known, as the next index.

        Raises:
            ValueError: tensors of another kind of locator, or of another width than the tasks before.
        """
        expected = {*self.names, *STATISTICS}
        if set(tensors) != expected:
            raise ValueError(
                f"not the tensors of a {self._settings.kind} locator: {sorted(set(tensors) ^ expected)} missing or "
                "unknown; keep locator.kind within a run"
            )
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
        """Score prompts under every known task; the lowest score wins unless it lies above that task's threshold."""
        x_BD = _normalised(feature_BD.to(self._device))
        if not self._stacked:
            return nearest_task(x_BD.new_zeros(len(x_BD), 0), x_BD.new_zeros(0))
        score_NB = self.error(self._stacked, x_BD)
        if self._settings.score == "z":
            score_NB = (score_NB - self._stacked["error_mean"].unsqueeze(1)) / self._stacked["error_std"].unsqueeze(1)
        located = nearest_task(score_NB.T.contiguous(), self._stacked["threshold"])
        if self._settings.selection == "hard":
            return located
        return nearest_tasks(located, self._settings.num_mixed, self._settings.temperature)

    def _statistics(self, error_S: Tensor) -> dict[str, Tensor]:
        """Mean and standard deviation of held-out errors, and the score above which a prompt is not of this task."""
        # Early stopping, where there is any, read the same errors, so m_t is a little low, for all tasks alike.
        mean = error_S.mean()
        # Identical prompts have identical errors; eps keeps their score finite.
        std = error_S.std().clamp_min(torch.finfo(torch.float32).eps)
        threshold = torch.quantile((error_S - mean) / std, UNSEEN_QUANTILE).clamp_min(UNSEEN_FLOOR)
        if self._settings.unseen_threshold is not None:
            threshold = torch.full_like(threshold, self._settings.unseen_threshold)
        if self._settings.score == "raw":
            threshold = mean + threshold * std
        return dict(zip(STATISTICS, (mean, std, threshold), strict=True))


def nearest_task(score_BN: Tensor, threshold_N: Tensor) -> Located:
    """Hard selection: the task with the lowest score, or -1 where even that one lies above its own threshold."""
    if score_BN.shape[1] == 0:
        nobody_B = torch.full(score_BN.shape[:1], -1, dtype=torch.long, device=score_BN.device)
        return Located.at(nobody_B, score_BN)
    best_B, task_B = score_BN.min(dim=1)
    # Written as "known if below", so that a score that is not a number is unknown.
    known_B = best_B <= threshold_N[task_B]
    return Located.at(torch.where(known_B, task_B, -1), score_BN)


def nearest_tasks(located: Located, num: int, temperature: float) -> Located:
    """Soft selection: the `num` tasks with the lowest scores, weighted by softmax(-score / temperature) over them.

    What hard selection sends to the base model still goes there: softness is about which tasks, not about whether.
    """
    score_BN = located.score_BN
    assert score_BN is not None, "a locator scores"
    score_BK, tasks_BK = score_BN.topk(min(num, score_BN.shape[1]), dim=1, largest=False)
    known_B1 = (located.task_B >= 0).unsqueeze(1)
    weights_BK = (-score_BK / temperature).softmax(dim=1)
    # Not a product with 0: the scores of an unknown prompt may be no numbers.
    return Located(torch.where(known_B1, tasks_BK, -1), torch.where(known_B1, weights_BK, 0.0), score_BN)


def _normalised(feature_BD: Tensor) -> Tensor:
    return functional.layer_norm(feature_BD.float(), feature_BD.shape[-1:])
