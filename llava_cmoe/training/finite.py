"""Stops a stage at the first loss, gradient or weight that is not finite: what follows would be NaN, and be committed.

The Trainer's own filter replaces such losses by the mean of those before them (0.0 where there are none) after asking
the device for every batch; here it is asked once a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_cmoe.training.order import name_of

FIX = (
    "nothing of this stage is kept; load the backbone in bfloat16 or float32 if it is in float16 (backbone.dtype), or "
    "lower training.learning_rate or training.max_grad_norm"
)
NUM_NAMED = 8
"""Rows that an error names."""


class NotFiniteError(RuntimeError):
    """Training that has left the finite numbers; the message names the step, its rows and the fix."""


class FiniteSteps:
    """The losses of one optimizer step, with the rows that they are of, until the step's gradient is known."""

    def __init__(self, samples: Dataset[Any]) -> None:
        """`samples` name their rows, where they can."""
        self._samples = samples
        self._losses: list[Tensor] = []
        self._rows: list[Tensor] = []

    @property
    def num_passes(self) -> int:
        """Forward passes of this step so far."""
        return len(self._losses)

    def add(self, row_B: Tensor, loss: Tensor) -> None:
        """Remember a forward pass's rows and its loss; nothing is read from the device."""
        self._rows.append(row_B)
        self._losses.append(loss.detach())

    def check(self, step: int, gradient_norm: Tensor | float) -> None:
        """Look at the step as a whole, and begin the next one.

        Args:
            step: its number, from 1.
            gradient_norm: before clipping, the same on all processes: so all of them stop at the same step.

        Raises:
            NotFiniteError: a loss or the norm is not finite.
        """
        losses, rows = self._losses, self._rows
        self._losses, self._rows = [], []
        device = losses[0].device
        norm = torch.as_tensor(gradient_norm, device=device)
        seen = torch.stack([one.float().reshape(()) for one in (*losses, norm)])
        if bool(seen.isfinite().all()):
            return
        numbers = seen.tolist()
        bad = [number for number, loss in enumerate(numbers[:-1]) if not _is_finite(loss)]
        what = f"the loss is {numbers[bad[0]]}" if bad else f"the gradient's norm is {numbers[-1]}"
        of = [row for number in bad or range(len(rows)) for row in rows[number].tolist() if row >= 0]
        raise NotFiniteError(f"step {step}: {what} (rows {self._named(of)}); {FIX}")

    def _named(self, rows: list[int]) -> str:
        names = [name_of(self._samples, row) for row in rows[:NUM_NAMED]]
        return ", ".join(names) + (f" and {len(rows) - NUM_NAMED} more" if len(rows) > NUM_NAMED else "")


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Look at what a stage has trained, once at its end: the last step has no next one to find it out.

    Raises:
        NotFiniteError: names the first tensor that is not finite.
    """
    for name, value in weights.items():
        if not bool(value.isfinite().all()):
            raise NotFiniteError(f"after the last step {name} is not finite; {FIX}")


def _is_finite(number: float) -> bool:
    return abs(number) < float("inf")
