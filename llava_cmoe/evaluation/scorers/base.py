"""What a scorer is given and what it returns; how an answer is judged is left to one file per rule.

What a scorer demands of a row is stated in `data/demands.py`, so that reading the rows can ask before anything is
learned; a rule that cannot do without it calls the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_cmoe.settings.base import shown
from llava_cmoe.settings.evaluation import EvaluationSettings

LONGEST = 1000
"""Characters of a number in an answer; one that a model did not bring to an end is no number (nor could Python read
those of over 4300 digits)."""


@dataclass(frozen=True)
class Reference:
    """The truth about one evaluation row.

    Attributes:
        answer: the one reference answer (an option's letter in multiple choice, the box as written in grounding).
        answers: all that are right where there are several: ten annotators', or a picture's captions; else empty.
        box: (x1, y1, x2, y2) on the padded square, each in [0, 1]; empty unless grounding.
        choices: the options' texts in order; empty unless multiple choice.
        size: (width, height) of the picture in pixels; empty where the row does not tell.
        id: the row's id, for messages.
        question: the user's turn; only a judge that reads it asks for it.
    """

    answer: str = ""
    answers: tuple[str, ...] = ()
    box: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()
    size: tuple[int, ...] = ()
    id: str = ""
    question: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Reference:
        """Read the reference out of a canonical evaluation row."""
        lists = {name: tuple(row[name]) for name in ("answers", "box", "choices", "size")}
        return cls(answer=row["answer"], id=row["id"], question=row["turns"][0]["text"], **lists)


@dataclass(frozen=True)
class Score:
    """How good one answer is.

    Attributes:
        value: in [0, 1].
        detail: further numbers whose means are reported beside the accuracy (grounding: `iou`).
    """

    value: float
    detail: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskScore:
    """How good all answers to a task are.

    Attributes:
        accuracy: as a fraction of one; the mean of `values`, unless a scorer judges the task as a whole.
        values: of each answer, in the order in which they were given.
        detail: further numbers, as fractions of one.
    """

    accuracy: float
    values: tuple[float, ...]
    detail: Mapping[str, float]


Rule = Callable[[str, Reference], Score]
"""Judges one answer by itself; ValueError where the row can't be scored."""

Scorer = Callable[[Sequence[str], Sequence[Reference]], TaskScore]
"""Judges all answers to a task, at least one, each with its reference."""

Builder = Callable[[EvaluationSettings], Scorer]
"""Makes a scorer before anything is learned; RecipeError names what it lacks on this machine or in the settings."""


def each(rule: Rule) -> Builder:
    """A scorer that needs nothing, judges every answer by itself and takes means."""

    def score(texts: Sequence[str], references: Sequence[Reference]) -> TaskScore:
        scores = [_blamed(rule, text, reference) for text, reference in zip(texts, references, strict=True)]
        values = tuple(score.value for score in scores)
        detail = {name: mean([score.detail[name] for score in scores]) for name in scores[0].detail}
        return TaskScore(mean(values), values, detail)

    return lambda settings: score


def _blamed(rule: Rule, text: str, reference: Reference) -> Score:
    try:
        return rule(text, reference)
    except ValueError as error:
        raise ValueError(f"row {shown(reference.id)}: {error}") from error


def mean(values: Sequence[float]) -> float:
    """By `math.fsum`, so that it does not depend on the order."""
    return math.fsum(values) / len(values)
