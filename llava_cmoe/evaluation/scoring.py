"""Scores of answers files, cell by cell of the accuracy matrix; needs no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from datasets import Dataset

from llava_cmoe.evaluation.eval_spec import EvalSpec, complete
from llava_cmoe.evaluation.generate import RouteName
from llava_cmoe.evaluation.joining import score_by_id
from llava_cmoe.evaluation.log import Answer, read_answers
from llava_cmoe.evaluation.scorers import PROTOCOLS, Reference, Scorer, TaskScore, get_scorer
from llava_cmoe.evaluation.scorers.base import mean


@dataclass(frozen=True)
class Cell:
    """One cell of the accuracy matrix.

    Attributes:
        after: index of the task learned last.
        task: index of the task that was asked.
        route: whose routers answered.
        accuracy: percent.
        scores: of each row, in the rows' order; the accuracy is their mean, unless the scorer judges a task as a whole.
        detail: means of the scorer's further numbers (grounding: `iou`).
        failed: rows that could not be answered; they count as wrong.
        other_protocols: accuracy of the same answers in percent under each other protocol that judges this task.
    """

    after: int
    task: int
    route: RouteName
    accuracy: float
    scores: tuple[float, ...]
    detail: Mapping[str, float] = field(default_factory=dict)
    failed: int = 0
    other_protocols: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_mean(self) -> bool:
        """Whether the accuracy is a mean over questions, which drawing questions anew tells the sureness of."""
        return math.isclose(self.accuracy, 100 * mean(self.scores), abs_tol=1e-9)


def score_after(eval_spec: EvalSpec, after: int) -> list[Cell]:
    """Score every complete answers file of one row of the matrix; needs no model."""
    return [score_cell(eval_spec, after, task, route) for task, route in complete(eval_spec, after)]


def score_cell(eval_spec: EvalSpec, after: int, task: int, route: RouteName) -> Cell:
    """Score one answers file."""
    spec = eval_spec.sequence.tasks[task]
    path = eval_spec.answers_path(after, task, route)
    answers, rows = read_answers(path), eval_spec.rows[spec.name]
    score = score_answers(answers, rows, get_scorer(spec.scorer, eval_spec.settings), source=str(path))
    others = [
        name for name in PROTOCOLS if name != eval_spec.settings.protocol and spec.scorer in PROTOCOLS[name].scorers
    ]
    other_protocols = {}
    for protocol in others:
        settings = eval_spec.settings.model_copy(update={"protocol": protocol})
        judged = score_answers(answers, rows, get_scorer(spec.scorer, settings), source=f"{path} ({protocol})")
        other_protocols[protocol] = 100 * judged.accuracy
    failed = sum(answer.failed is not None for answer in answers)
    return Cell(after, task, route, 100 * score.accuracy, score.values, score.detail, failed, other_protocols)


def score_answers(answers: Sequence[Answer], rows: Dataset, scorer: Scorer, source: str) -> TaskScore:
    """Scores in the rows' order, answers joined by id; `source` names the answers in errors. What failed is wrong.

    Raises:
        ValueError: an id is missing, doubled or unknown, or a row cannot be scored.
    """
    pairs = [(answer.id, answer.text) for answer in answers]
    references = (Reference.from_row(row) for row in rows)
    judged = score_by_id(pairs, references, scorer, source, fix="delete it to generate again")
    failed = {answer.id for answer in answers if answer.failed is not None}
    values = [0.0 if row_id in failed else value for row_id, value in zip(rows["id"], judged.values, strict=True)]
    return replace(judged, values=tuple(values), accuracy=judged.accuracy - mean(judged.values) + mean(values))
