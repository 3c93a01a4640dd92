"""What a scorer is given and what it returns; how an answer is judged is left to one file per rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reference:
    """The truth about one evaluation row.

    Attributes:
        answer: the one reference answer (an option's letter in multiple choice, empty in grounding).
        answers: the ten annotators' answers where they exist, else empty.
        box: (x1, y1, x2, y2) on the padded square, each in [0, 1]; empty unless grounding.
        choices: the options' texts in order; empty unless multiple choice.
    """

    answer: str = ""
    answers: tuple[str, ...] = ()
    box: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Reference:
        """Read the reference out of a canonical evaluation row."""
        return cls(row["answer"], tuple(row["answers"]), tuple(row["box"]), tuple(row["choices"]))


@dataclass(frozen=True)
class Score:
    """How good one answer is.

    Attributes:
        value: in [0, 1]; a task's accuracy is the mean of these.
        detail: further numbers whose means are reported beside the accuracy (grounding: `iou`).
    """

    value: float
    detail: Mapping[str, float] = field(default_factory=dict)


Scorer = Callable[[str, Reference], Score]
