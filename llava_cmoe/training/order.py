"""The order of rows in which a step reads rows of one kind, with a picture or without, and of like length.

Padding costs what tokens cost, and a step without pictures needs no vision encoder: rows that differ are kept apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Sampler, Subset
from transformers.trainer_pt_utils import get_length_grouped_indices

from llava_cmoe.data.collator import ROW

Kind = tuple[bool, int]
"""Whether a row has a picture, and its length in whatever unit."""


class LengthGroupedSampler(Sampler[int]):
    """Steps of rows that are alike, in an order drawn anew in each epoch; the rows that fill no step come last.

    The order depends on seed and epoch alone, so it is the same on every process and after a restart.
    """

    def __init__(self, kinds: Sequence[Kind], step: int, seed: int) -> None:
        """`step` is the number of rows of one optimizer step, over all processes."""
        self._kinds, self._step, self._seed, self._epoch = kinds, step, seed, 0

    def __len__(self) -> int:
        return len(self._kinds)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        steps: list[list[int]] = []
        rest: list[int] = []
        for pictured in (True, False):
            rows = [row for row, (has_picture, _) in enumerate(self._kinds) if has_picture == pictured]
            lengths = [self._kinds[row][1] for row in rows]
            order: list[int] = []
            if rows:
                order = get_length_grouped_indices(lengths, self._step, generator=generator)  # type: ignore[no-untyped-call]
            whole = len(rows) - len(rows) % self._step
            steps += [[rows[index] for index in order[at : at + self._step]] for at in range(0, whole, self._step)]
            rest += [rows[index] for index in order[whole:]]
        for step in torch.randperm(len(steps), generator=generator).tolist():
            yield from steps[step]
        yield from rest


class NumberedRows(Dataset[dict[str, Tensor]]):
    """Rows that carry their place among these rows as `row` (1,), so that a method can tell whose they are."""

    def __init__(self, rows: Dataset[dict[str, Tensor]]) -> None:
        """Nothing is read before a row is."""
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.rows[index], ROW: torch.tensor([index])}

    def kinds(self) -> list[Kind]:
        """Those of the rows."""
        return kinds_of(self.rows)


def kinds_of(samples: Dataset[Any]) -> list[Kind]:
    """The kinds of some rows, or of a part of them, without encoding one.

    Raises:
        ValueError: rows that cannot tell their kinds.
    """
    if isinstance(samples, Subset):
        kinds = kinds_of(samples.dataset)
        return [kinds[index] for index in samples.indices]
    if isinstance(samples, ConcatDataset):
        return [kind for part in samples.datasets for kind in kinds_of(part)]
    if not hasattr(samples, "kinds"):
        raise ValueError(f"{type(samples).__name__} has no kinds(): which rows have a picture, and how long they are")
    kinds_of_rows: list[Kind] = samples.kinds()
    return kinds_of_rows


def name_of(samples: Dataset[Any], index: int) -> str:
    """A row's id, or its place among these rows where they cannot tell ids."""
    if isinstance(samples, Subset):
        return name_of(samples.dataset, samples.indices[index])
    if isinstance(samples, ConcatDataset):
        part = bisect_right(samples.cumulative_sizes, index)
        return name_of(samples.datasets[part], index - ([0, *samples.cumulative_sizes][part]))
    return str(samples.id_of(index)) if hasattr(samples, "id_of") else str(index)
