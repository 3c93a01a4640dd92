"""What scoring demands of an evaluation row, by scorer: asked when rows are read, hours before any answer is judged.

A scorer asks the same function again when it judges, so a row that was let through here is never refused there. One
that takes any row with an answer needs no entry. What a row looks like before that is `coin_rows.py`'s.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from llava_cmoe.data.problems import Unusable
from llava_cmoe.data.rows import EvalRow
from llava_cmoe.data.spelling import is_blank
from llava_cmoe.settings.base import shown

BOXED = frozenset({"grounding"})
"""Scorers whose truth is a box, in `answer_bbox`."""
CHOSEN = frozenset({"scienceqa"})
"""Scorers that look at a row's choices."""
SEVERAL_ANSWERS = frozenset({"captions", "vqa_soft"})
"""Scorers of tasks whose rows may give a list of answers; to any other, a list is a mistake."""

NUM_ANNOTATORS = 10
"""Annotators that the soft score is defined for."""


class Judged(Protocol):
    """What a row is judged by: an evaluation row's truth, as the scorers' references hold it, too."""

    @property
    def id(self) -> str:
        """The row's id."""

    @property
    def answer(self) -> str:
        """The one reference answer."""

    @property
    def answers(self) -> Sequence[str]:
        """All answers that are right, or annotators'."""

    @property
    def choices(self) -> Sequence[str]:
        """The options' texts in order."""

    @property
    def box(self) -> Sequence[float]:
        """Coordinates of the true box."""


@dataclass(frozen=True)
class Truth:
    """The truth of an evaluation row."""

    id: str
    answer: str
    answers: Sequence[str]
    choices: Sequence[str]
    box: Sequence[float]


Demand = Callable[[Judged], None]
"""Raises Unusable, a ValueError, for a row that the scorer could not judge; the message says what to mend."""


def check_demand(scorer: str, row: EvalRow) -> None:
    """Ask a task's scorer whether it can judge a row.

    Raises:
        Unusable: it cannot; says why and what to mend.
    """
    if scorer in DEMANDS:
        DEMANDS[scorer](Truth(row["id"], row["answer"], row["answers"], row["choices"], row["box"]))


def letter_of_a_choice(row: Judged) -> None:
    """Choices, at most as many as there are letters, and the letter of one of them as the answer."""
    if not row.choices:
        raise Unusable("the row has no choices: set the task's annotations to ScienceQA's problems.json")
    letters = string.ascii_uppercase[: len(row.choices)]
    if len(row.choices) > len(letters):
        raise Unusable(f"the row has {len(row.choices)} choices, more than there are letters: check the row's choices")
    if len(row.answer) != 1 or row.answer not in letters:
        raise Unusable(
            f"the answer {shown(row.answer)} to question {shown(row.id)} is not the letter of one of the "
            f"{len(row.choices)} choices ({', '.join(letters)}): correct the row's answer, or its choices in "
            "the annotations"
        )


def ten_answers(row: Judged) -> None:
    """Ten annotators' answers."""
    if len(row.answers) != NUM_ANNOTATORS:
        raise Unusable(
            f"the row has {len(row.answers)} annotators' answers, the soft score needs {NUM_ANNOTATORS}: check the "
            "task's annotations or the row's `answers`, or take scorer vqa_soft, which takes any number"
        )


def one_answer_or_ten(row: Judged) -> None:
    """One answer that shows something, or ten annotators'."""
    if row.answers:
        ten_answers(row)
    else:
        an_answer(row)


def an_answer(row: Judged) -> None:
    """An answer that shows something, alone or as one of several."""
    if all(map(is_blank, row.answers or (row.answer,))):
        raise Unusable("the row has no answer that shows anything: check the row's answer")


def captions(row: Judged) -> None:
    """At least one caption, and none that is empty."""
    if any(map(is_blank, row.answers or (row.answer,))):
        raise Unusable("an empty caption: check the task's annotations, or the row's answer where it has none")


def four_numbers(row: Judged) -> None:
    """A true box."""
    if len(row.box) != 4:
        raise Unusable(f"the row's box has {len(row.box)} numbers, 4 are needed: check answer_bbox")


DEMANDS: Mapping[str, Demand] = {
    "scienceqa": letter_of_a_choice,
    "textvqa": ten_answers,
    "grounding": four_numbers,
    "captions": captions,
    **dict.fromkeys(("imagenet", "gqa", "vizwiz", "vqav2", "ocrvqa", "numeric"), one_answer_or_ten),
    **dict.fromkeys(("vqa_soft", "llm_judge"), an_answer),
}
"""Name of a scorer to what it demands; `coin` demands no more than `strict`, so one table serves both."""
