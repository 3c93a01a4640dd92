"""The validation split: a tenth of a task's training rows, held out from learning, asked as evaluation rows are.

Settings are chosen on it, so that test questions are read once, by the settings that were chosen. It has a seed of its
own: all runs are asked the same rows. Of a conversation the first question is asked; what evaluation files have beside
a question (options, annotators' answers, a box) is read off the row itself.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset

from llava_cmoe.data.coin_rows import box_of
from llava_cmoe.data.demands import BOXED, CHOSEN, NUM_ANNOTATORS, check_demand
from llava_cmoe.data.problems import DataError, Problem, Unusable
from llava_cmoe.data.rows import EVAL_FEATURES, EvalRow

SHARE = 0.1
SEED = 1


def split(rows: Dataset) -> tuple[Dataset, Dataset]:
    """The rows that may be learned and those that are asked, each in their order; of a single row none is asked."""
    order = Random(SEED).sample(range(len(rows)), len(rows))
    num_asked = min(max(1, round(SHARE * len(rows))), len(rows) - 1)
    return rows.select(sorted(order[num_asked:])), rows.select(sorted(order[:num_asked]))


def as_questions(rows: Dataset, scorer: str, file: Path) -> Dataset:
    """Training rows as evaluation rows (`rows.EVAL_FEATURES`); their ids become unique by what tells them apart.

    Args:
        rows: canonical training rows.
        scorer: of their task.
        file: that they were read from.

    Raises:
        DataError: a row that the scorer could not judge; names the file, the row and why.
    """
    questions = []
    for number, row in enumerate(rows):
        try:
            question = _question(row, scorer, f"{number}/{row['id']}")
            check_demand(scorer, question)
        except Unusable as error:
            reason = f"cannot be asked in the validation split: {error}"
            raise DataError(Problem(file, reason, row_id=row["id"])) from error
        questions.append(question)
    return Dataset.from_list(questions, features=EVAL_FEATURES)


def _question(row: Mapping[str, Any], scorer: str, row_id: str) -> EvalRow:
    asked, answered = row["turns"][0], row["turns"][1]["text"].strip()
    return {
        "id": row_id,
        "image": row["image"],
        "turns": [asked],
        "answer": answered,
        "answers": [answered] * NUM_ANNOTATORS if scorer == "textvqa" else [],
        "box": box_of(answered) if scorer in BOXED else [],
        "size": [],
        "choices": options_of(asked["text"]) if scorer in CHOSEN else [],
    }


def options_of(question: str) -> list[str]:
    """The options that a question lists, a line each: `A. moss`, `(B) fern`."""
    found = re.findall(r"^\(?([A-Z])[.)]\s*(.+?)\s*$", question, flags=re.MULTILINE)
    letters = [letter for letter, _ in found]
    return [option for _, option in found] if letters == list(string.ascii_uppercase[: len(letters)]) else []
