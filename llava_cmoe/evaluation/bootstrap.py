"""How sure a mean over questions is: the nonparametric bootstrap (Efron 1979), seeded, percentile intervals.

EvalSet are drawn anew, models are not: an interval says what other questions would change, not what another training
seed would. EvalSet with equal scores are interchangeable, so whole groups of them are drawn at once (a multinomial
over the groups): the same distribution, at a cost that does not grow with the number of questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llava_cmoe.evaluation.metrics import all_metrics

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0

DESCRIPTION: dict[str, float | int | str] = {
    "drawn": "questions of each task, with replacement; those of one task together after every stage",
    "interval": "percentile",
    "level": LEVEL,
    "resamples": RESAMPLES,
    "seed": SEED,
}
"""Stands in the results beside the intervals."""

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def resampled_means(scores_QC: Floats, task: int) -> Floats:
    """Means over questions drawn with replacement: one row per draw, shape (RESAMPLES, C).

    Args:
        scores_QC: score of each question in each of C conditions (after several stages, or of several runs); a draw
            takes the same questions in all of them, so differences of columns are paired.
        task: number of the draw: different ones are independent, the same one takes the same questions every time.
    """
    patterns_PC, count_P = np.unique(scores_QC, axis=0, return_counts=True)
    num_questions = count_P.sum()
    generator = np.random.default_rng([SEED, task])
    drawn_RP = generator.multinomial(num_questions, count_P / num_questions, size=RESAMPLES)
    means_RC: Floats = drawn_RP @ patterns_PC / num_questions
    return means_RC


def accuracy_interval(scores: Sequence[float], task: int) -> Interval:
    """Of one cell of the accuracy matrix, in percent, from its questions' scores in [0, 1]."""
    return interval(100 * resampled_means(np.array(scores)[:, None], task)[:, 0])


def metric_intervals(scores: Mapping[tuple[int, int], Sequence[float]], num_rows: int) -> dict[str, Interval | None]:
    """Of every metric at once: each draw of questions gives an accuracy matrix, whose metrics are taken as always.

    Args:
        scores: (stage, task), both from 0, to the scores of the task's questions, always in the same order.
        num_rows: stages of the matrix.
    """
    num_tasks = max([num_rows, *(task + 1 for _, task in scores)])
    matrix_RJI = np.full((RESAMPLES, num_rows, num_tasks), None, dtype=object)
    for task in range(num_tasks):
        stages = [stage for stage in range(num_rows) if (stage, task) in scores]
        if stages:
            scores_QC = np.array([scores[stage, task] for stage in stages]).T
            matrix_RJI[:, stages, task] = 100 * resampled_means(scores_QC, task)
    drawn = [all_metrics(matrix) for matrix in matrix_RJI.tolist()]
    return {
        name: None if value is None else interval(np.array([metrics[name] for metrics in drawn]))
        for name, value in drawn[0].items()
    }


def interval(values_R: Floats) -> Interval:
    """The middle 95 percent of resampled values, rounded to hundredths, which is finer than it is sure.

    Where all questions are right, or all wrong, every draw agrees and the interval is a point: it is then too narrow.
    """
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values_R, [tail, 1 - tail])
    return round(float(low), 2), round(float(high), 2)


def p_value(differences_R: Floats) -> float:
    """Two-sided: how often a resampled difference falls on the other side of zero; at least 2 / (RESAMPLES + 1)."""
    below, above = (differences_R <= 0).sum(), (differences_R >= 0).sum()
    return min(1.0, 2 * float(min(below, above) + 1) / (len(differences_R) + 1))
