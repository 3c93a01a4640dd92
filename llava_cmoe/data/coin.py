"""Reads CoIN's and LLaVA's JSON files into canonical rows, and finds everything that is wrong with them.

Where the files lie is `paths.py`'s, what makes a row usable `coin_rows.py`'s, whether its scorer can judge it
`demands.py`'s. Opening the pictures and comparing files with each other is left to `check.py`. Parsing is one code
path: a generator of rows and problems, of which a reader raises the first problem and the check lists all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from llava_cmoe.data.annotations import Annotations, read_annotations
from llava_cmoe.data.coin_rows import eval_row, kind_of, row_id_of, train_row
from llava_cmoe.data.demands import check_demand
from llava_cmoe.data.fields import unread_fields
from llava_cmoe.data.paths import annotations_file, eval_file, eval_images, train_file, train_images
from llava_cmoe.data.picture_folder import PictureFolder
from llava_cmoe.data.problems import DataError, LostForGood, Problem, Unusable
from llava_cmoe.data.rows import EVAL_FEATURES, TRAIN_FEATURES, EvalRow, TrainRow
from llava_cmoe.data.tasks import TaskSpec
from llava_cmoe.settings.plain_json import PlainJsonError, parse_json

NO_PICTURES = "it shows a picture and the backbone reads text alone; set backbone.path to one that reads images"
"""What is wrong with a row with a picture then."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Read:
    """A row and where it came from.

    Attributes:
        file: its file.
        index: its place in the file's JSON array, from 0.
        row: the row.
        unread: names of its fields that say something about it and are not read.
    """

    file: Path
    index: int
    row: TrainRow | EvalRow
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lost:
    """A row that is left out, as its picture is known to be lost everywhere."""

    file: Path
    index: int
    row_id: str
    image: str


Parsed = Iterator[Read | Lost | Problem]


def read_train(root: Path, task: TaskSpec) -> Dataset:
    """All training rows of a task (`rows.TRAIN_FEATURES`).

    Raises:
        DataError: the first problem found; names file, row and reason.
    """
    return Dataset.from_list(_rows(parse_train(root, task)), features=TRAIN_FEATURES)


def read_eval(root: Path, task: TaskSpec) -> Dataset:
    """All evaluation rows of a task (`rows.EVAL_FEATURES`); ids are unique.

    Raises:
        DataError: the first problem found; names file, row and reason.
    """
    return Dataset.from_list(_rows(parse_eval(root, task)), features=EVAL_FEATURES)


def parse_train(root: Path, task: TaskSpec) -> Parsed:
    """Every training row of a task, or what is wrong with it."""
    try:
        file, pictures = train_file(root, task), PictureFolder(train_images(root, task), task.lost)
    except DataError as error:
        yield error.problem
        return
    yield from _parse(file, lambda raw, row_id, index: train_row(raw, row_id, pictures))


def parse_eval(root: Path, task: TaskSpec) -> Parsed:
    """Every evaluation row of a task, or what is wrong with it; wrong annotations come first.

    A row that the task's scorer could not judge is wrong, too, unless its annotations are missing or broken, which is
    one problem and not one of every row.
    """
    try:
        file, pictures = eval_file(root, task), PictureFolder(eval_images(root, task), task.lost)
    except DataError as error:
        yield error.problem
        return
    try:
        annotations, annotated = _annotations(root, task), True
    except DataError as error:
        yield error.problem
        annotations, annotated = None, False
    seen: dict[str, int] = {}

    def read_row(raw: Mapping[str, Any], row_id: str, index: int) -> EvalRow:
        if seen.setdefault(row_id, index) != index:
            raise Unusable(f"the id occurs in an earlier row, {seen[row_id]}")
        row = eval_row(raw, row_id, pictures, task.scorer)
        if annotations is not None:
            annotations.complete(row)
        if annotated:
            check_demand(task.scorer, row)
        return row

    yield from _parse(file, read_row)


def refuse_pictures(root: Path, tasks: Iterable[TaskSpec]) -> None:
    """Stop at the first row with a picture, for a backbone that reads text alone.

    Raises:
        DataError: names file and row.
    """
    for task in tasks:
        for read in (*parse_train(root, task), *parse_eval(root, task)):
            if isinstance(read, Read) and read.row["image"] is not None:
                raise DataError(Problem(read.file, NO_PICTURES, read.index, read.row["id"]))


def _annotations(root: Path, task: TaskSpec) -> Annotations | None:
    file = annotations_file(root, task)
    return None if file is None else read_annotations(file, _load_json(file), task.scorer, eval_images(root, task))


def _rows(parsed: Parsed) -> list[TrainRow | EvalRow]:
    rows = []
    for item in parsed:
        if isinstance(item, Problem):
            raise DataError(item)
        if isinstance(item, Lost):
            where = f"{item.file}, row {item.index} (id {item.row_id})"
            logger.warning("%s: left out, %s is lost for good", where, item.image)
        else:
            rows.append(item.row)
    return rows


def _parse(file: Path, read_row: Callable[[Mapping[str, Any], str, int], TrainRow | EvalRow]) -> Parsed:
    try:
        array = _load_json(file)
    except DataError as error:
        yield error.problem
        return
    if not isinstance(array, list) or not array:
        yield Problem(file, f"expected a JSON array of rows, found {kind_of(array)}")
        return
    for index, raw in enumerate(array):
        row_id = ""
        item: Read | Lost | Problem
        try:
            row_id = row_id_of(raw)
            unread = unread_fields(raw)
            item = Read(file, index, read_row(raw, row_id, index), unread)
        except Unusable as error:
            item = Problem(file, str(error), index, row_id or None)
        except LostForGood as error:
            item = Lost(file, index, row_id, str(error))
        yield item


def _load_json(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
        return parse_json(text)
    except OSError as error:
        raise DataError(Problem(file, f"cannot read the file ({error.strerror})")) from error
    except json.JSONDecodeError as error:
        if not text.strip():
            raise DataError(Problem(file, "the file is empty")) from error
        reason = f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        hint = "; one object a line (.jsonl)? put them into one array" if error.msg == "Extra data" else ""
        raise DataError(Problem(file, reason + hint)) from error
    except PlainJsonError as error:
        raise DataError(Problem(file, str(error))) from error
    except UnicodeDecodeError as error:
        raise DataError(Problem(file, f"not UTF-8 text at byte {error.start}")) from error


def raw_ids(root: Path, task: TaskSpec) -> dict[str, int | str]:
    """Id of every evaluation row to the same as it stands in the file, a number or a string, in the file's order."""
    return {row_id_of(raw): raw.get("question_id", raw.get("id")) for raw in _load_json(eval_file(root, task))}
