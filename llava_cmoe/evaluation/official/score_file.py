"""Scores an answers file of any model against a task's official files, in either protocol, and writes the result.

out.json     {"task": "VizWiz", "protocol": "coin", "version": 1, "accuracy": 54.2, "accuracy_unit": "percent",
              "num_samples": 4319, ..., "per_question": {"VizWiz_val_00000000.jpg": 1.0, ...}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llava_cmoe.evaluation.joining import score_by_id
from llava_cmoe.evaluation.official.files import Annotations, Line, ScoringError, blamed, read_lines, task_named
from llava_cmoe.evaluation.official.references import references_of
from llava_cmoe.evaluation.official.released_scripts import RELEASED
from llava_cmoe.evaluation.scorers import PROTOCOLS, get_scorer
from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.provenance.fingerprints import fingerprint_file
from llava_cmoe.settings.base import shown
from llava_cmoe.settings.evaluation import EvaluationSettings

ProtocolName = Literal["strict", "coin"]


class FileScore(BaseModel):
    """What an answers file is worth."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    task: str
    """CoIN's name of the task."""
    protocol: ProtocolName
    """How answers are joined with questions, and judged."""
    version: int
    """Version of the protocol; results of two versions are not comparable."""
    accuracy: float
    """In percent of `num_samples`."""
    accuracy_unit: Literal["percent"] = "percent"
    """Unit of the accuracy."""
    num_samples: int
    """What the accuracy is a mean over: the questions (strict), or what the released script counts (coin)."""
    detail: dict[str, float] = {}
    """Means of further numbers, as fractions of one (strict grounding: `iou`)."""
    answers: str
    """Name of the answers file."""
    answers_sha256: str
    """Of its bytes."""
    annotations: dict[str, str]
    """The official files that were read, and the sha256 of each."""
    per_question: dict[str, float]
    """Question id to score in [0, 1]. Of a repeated question that counts more than once (coin) the last score; a
    question that the accuracy leaves out is absent."""


def score_file(task: str, annotations: Path, answers: Path, protocol: ProtocolName) -> FileScore:
    """Score an answers file.

    Args:
        task: CoIN's name of the task, in any case.
        annotations: folder with the official files.
        answers: JSON lines in LLaVA's format.
        protocol: `strict`, or `coin`.

    Raises:
        ScoringError: a file is missing or broken, or the protocol refuses an answer; names file, row and fix.
    """
    name, folder = task_named(task), Annotations(annotations)
    lines = read_lines(answers)
    judge = {"strict": _strict, "coin": _coin}[protocol]
    accuracy, num_samples, detail, per_question = judge(name, folder, lines, str(answers))
    return FileScore(
        task=name,
        protocol=protocol,
        version=PROTOCOLS[protocol].version,
        accuracy=accuracy,
        num_samples=num_samples,
        detail=detail,
        answers=answers.name,
        answers_sha256=fingerprint_file(answers),
        annotations={name: fingerprint_file(annotations / name) for name in folder.read},
        per_question=per_question,
    )


def write_score(path: Path, score: FileScore) -> None:
    """Write a score atomically; in ASCII, as an id may hold what UTF-8 cannot."""
    write_atomically(path, json.dumps(score.model_dump(), indent=1, allow_nan=False).encode() + b"\n")


Outcome = tuple[float, int, dict[str, float], dict[str, float]]


def _strict(task: str, annotations: Annotations, lines: Sequence[Line], source: str) -> Outcome:
    references = references_of(task, annotations)
    answers = [_answer(line) for line in lines]
    fix = f"answer every row of {annotations.read[-1]} once"
    scorer = get_scorer(task.lower(), EvaluationSettings())
    try:
        score = score_by_id(answers, references, scorer, source, fix)
    except ValueError as error:
        raise ScoringError(str(error)) from error
    values = zip(references, score.values, strict=True)
    return 100 * score.accuracy, len(references), dict(score.detail), {row.id: value for row, value in values}


def _answer(line: Line) -> tuple[str, str]:
    with blamed(line.place, "an answer has a question_id (a string or whole number) and a text; mend the line"):
        question_id, text = line.answer["question_id"], line.answer["text"]
        if isinstance(question_id, bool) or not isinstance(question_id, (str, int)) or not isinstance(text, str):
            raise ValueError(f"question_id {shown(question_id)} and text {shown(text)} do not fit")
    return str(question_id), text


def _coin(task: str, annotations: Annotations, lines: Sequence[Line], source: str) -> Outcome:
    released = RELEASED[task]
    judged = list(released.judge(annotations, lines))
    if not judged:
        raise ScoringError(f"{source}: there is nothing to take a mean over; give answers to {task}")
    percent = released.percent(sum(value for _, value in judged), len(judged))
    return percent, len(judged), {}, {str(question_id): value for question_id, value in judged}
