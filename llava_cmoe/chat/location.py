"""What the locator says about questions that are not answered yet, and how a picture is squared by that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_cmoe.data.tasks import Geometry
from llava_cmoe.methods.base import Method
from llava_cmoe.records import Located

NO_WAY = (
    "its task cannot be told: squared as one task squares pictures, it is located at another; square the picture "
    "yourself"
)
"""Why a picture is refused that `agreeing_way` finds no way for."""


@dataclass(frozen=True)
class Verdict:
    """What the locator said about one question.

    Attributes:
        task: name of the task whose routers answer; None where no task fits and the base model answers.
        scores: every known task's score, the closest task (the lowest score) first.
    """

    task: str | None
    scores: Mapping[str, float]


def verdict_of(located: Located | None, row: int, names: Sequence[str]) -> Verdict | None:
    """What the locator said about one row of a batch; None where no locator decided."""
    if located is None or located.score_BN is None:
        return None
    task, scores = int(located.task_B[row]), located.score_BN[row].tolist()
    by_name = dict(sorted(zip(names, scores, strict=True), key=lambda item: item[1]))
    return Verdict(names[task] if task >= 0 else None, by_name)


@torch.no_grad()
def tasks_and_scores(method: Method, batch: dict[str, Tensor]) -> list[tuple[int, float]]:
    """The task of each prompt, -1 for none, and its score, infinite for none; without answering."""
    with method.answering(batch) as location:
        method.model.base_model(**batch, use_cache=False)
    located = location()
    assert located is not None and located.score_BN is not None, "a method that locates"
    return [
        (task, scores[task] if task >= 0 else float("inf"))
        for task, scores in zip(located.task_B.tolist(), located.score_BN.tolist(), strict=True)
    ]


def agreeing_way(located: Mapping[Geometry, tuple[int, float]], geometries: Sequence[Geometry]) -> Geometry | None:
    """The way to square a picture that agrees with the task that it is located at then; None if no way does.

    Of several the closest task's is taken; where only the base model fits, the first way that leads there.

    Args:
        located: way to the task, -1 for none, and the score of the picture squared so.
        geometries: of the known tasks.
    """
    agreeing = [way for way, (task, _) in located.items() if task >= 0 and geometries[task] == way]
    if agreeing:
        return min(agreeing, key=lambda way: located[way][1])
    return next((way for way, (task, _) in located.items() if task < 0), None)
