"""What a run's accuracy matrix says about learning and forgetting; pure functions, in whatever unit it has.

`matrix[j][i]` is the score on task i after learning task j (both from 0). Rows may be as short as j + 1; None marks a
cell that was not measured. A metric that needs such a cell is None, never a mean over what happens to be there, and
`missing_cells` names the cell. The definitions contradict each other across papers, so results carry `DEFINITIONS`
beside the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Matrix = Sequence[Sequence[float | None]]

DEFINITIONS: dict[str, str] = {
    "immediate": "mean over i of A[i,i]: each task right after learning it (MFT)",
    "last": "mean over i of A[T,i]: all tasks after the last one (MFN, ACC)",
    "maa": "(1/T) sum over j of the mean over i <= j of A[j,i]: mean average accuracy along the sequence",
    "bwt": "(1/T) sum over i of (A[T,i] - A[i,i]): backward transfer, divided by T as CoIN does",
    "bwt_gem": "the same sum divided by T - 1: backward transfer as GEM defines it",
    "forgetting": "mean over i < T of (max over j >= i of A[j,i]) - A[T,i]: loss against the best, never negative",
    "transfer": "mean of the measured A[j,i] with i > j: tasks before they are learned",
}
"""A[j,i]: score on task i after learning task j; T: the last task learned."""


def immediate(matrix: Matrix) -> float | None:
    """Mean of A[i,i]: MFT, mean fine-tune accuracy, in MCITlib (arXiv 2508.07307)."""
    return _mean(_diagonal(matrix))


def last(matrix: Matrix) -> float | None:
    """Mean of A[T,i]: ACC in GEM (Lopez-Paz & Ranzato 2017), MFN, mean final accuracy, in MCITlib."""
    return _mean(_final(matrix))


def maa(matrix: Matrix) -> float | None:
    """Mean over j of the mean of A[j,i], i <= j: mean average accuracy, as CoIN (arXiv 2403.08350) has it."""
    return _mean(_mean(_cell(matrix, j, i) for i in range(j + 1)) for j in range(len(matrix)))


def bwt(matrix: Matrix) -> float | None:
    """(1/T) sum of A[T,i] - A[i,i], as CoIN (arXiv 2403.08350) divides; the last task contributes 0."""
    return _mean(_differences(_final(matrix), _diagonal(matrix)))


def bwt_gem(matrix: Matrix) -> float | None:
    """The same sum divided by T - 1 (Lopez-Paz & Ranzato 2017); None for a single task."""
    return _mean(_differences(_final(matrix), _diagonal(matrix))[:-1])


def forgetting(matrix: Matrix) -> float | None:
    """Mean over i < T of the best A[j,i] so far minus A[T,i] (Chaudhry et al. 2018, RWalk); None for a single task.

    The maximum includes j = T, so that a task that gained counts 0, not less.
    """
    num_tasks = len(matrix)
    best = []
    for i in range(num_tasks - 1):
        column = [_cell(matrix, j, i) for j in range(i, num_tasks)]
        best.append(None if None in column else max(value for value in column if value is not None))
    return _mean(_differences(best, _final(matrix)[:-1]))


def transfer(matrix: Matrix) -> float | None:
    """Mean of A[j,i], i > j, over the cells that were measured; None if none was.

    Every cell weighs the same; ZSCL (2023), where the word comes from, averages within each task first.
    """
    return _mean(value for j, row in enumerate(matrix) for value in row[j + 1 :] if value is not None)


def all_metrics(matrix: Matrix) -> dict[str, float | None]:
    """Every metric by its name in `DEFINITIONS`, in that order."""
    functions = (immediate, last, maa, bwt, bwt_gem, forgetting, transfer)
    return {function.__name__: function(matrix) for function in functions}


def missing_cells(matrix: Matrix) -> dict[str, tuple[tuple[int, int], ...]]:
    """Metric to the cells (j, i), both from 0, that it needs and that were not measured; complete ones are absent."""
    num_tasks = len(matrix)
    diagonal = {(i, i) for i in range(num_tasks)}
    final = {(num_tasks - 1, i) for i in range(num_tasks)}
    triangle = {(j, i) for j in range(num_tasks) for i in range(j + 1)}
    needed = {
        "immediate": diagonal,
        "last": final,
        "maa": triangle,
        "bwt": diagonal | final,
        "bwt_gem": diagonal ^ final,  # the last task's cell is in both, and drops out of the sum
        "forgetting": triangle - (diagonal & final),
    }
    found = {
        name: tuple((j, i) for j, i in sorted(cells) if _cell(matrix, j, i) is None) for name, cells in needed.items()
    }
    return {name: cells for name, cells in found.items() if cells}


def _cell(matrix: Matrix, j: int, i: int) -> float | None:
    return matrix[j][i] if i < len(matrix[j]) else None


def _diagonal(matrix: Matrix) -> list[float | None]:
    return [_cell(matrix, i, i) for i in range(len(matrix))]


def _final(matrix: Matrix) -> list[float | None]:
    return [_cell(matrix, len(matrix) - 1, i) for i in range(len(matrix))]


def _differences(left: Sequence[float | None], right: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(left, right, strict=True)]


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean by `math.fsum`, so that it does not depend on the order; None if empty or if any value is missing."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(known) else None
