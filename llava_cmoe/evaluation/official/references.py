"""What is right, read from a task's official files: protocol `strict` on files, without pictures or a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_cmoe.data.annotations import answers_by_id, choices_by_id
from llava_cmoe.data.coin_rows import box_of, row_id_of
from llava_cmoe.data.demands import DEMANDS
from llava_cmoe.data.spelling import is_blank
from llava_cmoe.evaluation.official.files import Annotations, blamed
from llava_cmoe.evaluation.scorers.base import Reference
from llava_cmoe.settings.base import shown

FIX = "take the official file"


def references_of(task: str, annotations: Annotations) -> list[Reference]:
    """One per row of the task's file, in its order.

    Raises:
        ScoringError: a file or row is not as CoIN publishes it, an id or key occurs twice, or the task's scorer could
            not judge a row; names the file and the rows.
    """
    annotations = replace(annotations, strict=True)
    further = _further(task, annotations)
    name, rows = annotations.rows(task)
    place = str(annotations.folder / name)
    with blamed(place, FIX):
        if not isinstance(rows, list) or not rows:
            raise ValueError("no array of rows")
    references: dict[str, Reference] = {}
    for index, row in enumerate(rows):
        with blamed(f"{place}, row {index}", FIX):
            row_id = row_id_of(row)
            if row_id in references:
                raise ValueError(f"id {shown(row_id)} occurs in an earlier row, {list(references).index(row_id)}")
            if further is not None and row_id not in further:
                raise ValueError(f"no entry for id {shown(row_id)} in {annotations.read[0]}")
            extra = {} if further is None else further[row_id]
            references[row_id] = Reference(id=row_id, **_truth(task, row), **extra)
            DEMANDS[task.lower()](references[row_id])
    return list(references.values())


def _further(task: str, annotations: Annotations) -> dict[str, dict[str, Any]] | None:
    """What the rows' own file lacks, by row id; None where it lacks nothing."""
    match task:
        case "ScienceQA":
            problems = annotations.load("problems.json")
            with blamed(str(annotations.folder / "problems.json"), FIX):
                return {pid: {"choices": tuple(choices)} for pid, choices in choices_by_id(problems).items()}
        case "TextVQA":
            document = annotations.load("TextVQA_0.5.1_val.json")
            with blamed(str(annotations.folder / "TextVQA_0.5.1_val.json"), FIX):
                return {row_id: {"answers": tuple(answers)} for row_id, answers in answers_by_id(document).items()}
    return None


def _truth(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    match task:
        case "TextVQA":
            return {}  # ten annotators are asked instead
        case "Grounding":
            return {"box": tuple(box_of(_text(row, "answer_bbox")))}
        case _:
            return {"answer": _text(row, "answer")}


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or is_blank(value):
        raise ValueError(f"no {key} (a string)")
    return value
