"""Reads CoIN's and LLaVA's JSON files into canonical rows, and finds everything that is wrong with them.

Layout of a data root (several spellings of the instruction folder are in circulation):

    Instructions_Original/ScienceQA/train.json     cl_dataset/ScienceQA/images/train/1/image.png

Opening the pictures and comparing files with each other is left to `check.py`. Parsing is one code path: a generator
of rows and problems, of which a reader raises the first problem and the check lists all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from llava_cmoe.data.coin_rows import IMAGE_FOLDER, LostForGood, Unusable, eval_row, kind_of, row_id_of, train_row
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.rows import EVAL_FEATURES, TRAIN_FEATURES, EvalRow, TrainRow
from llava_cmoe.data.tasks import TaskSpec

logger = logging.getLogger(__name__)

INSTRUCTION_FOLDERS = tuple(
    f"{stem}_{kind}"
    for stem in ("Instructions", "Instruction")
    for kind in ("Original", "Type1", "Diverse", "Type2", "10Type")
)


@dataclass(frozen=True)
class Read:
    """A row and where it came from: `index` counts from 0 in the JSON array of `file`."""

    file: Path
    index: int
    row: TrainRow | EvalRow


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


def parse_train(root: Path, task: TaskSpec) -> Iterator[Read | Problem]:
    """Every training row of a task, or what is wrong with it."""
    folder = _image_folder(root)
    yield from _parse(root, task.train, lambda raw, row_id: train_row(raw, row_id, folder))


def parse_eval(root: Path, task: TaskSpec) -> Iterator[Read | Problem]:
    """Every evaluation row of a task, or what is wrong with it; wrong annotations come first."""
    try:
        annotations = _read_annotations(root, task)
    except DataError as error:
        yield error.problem
        annotations = None
    folder = _image_folder(root)
    seen: set[str] = set()

    def read_row(raw: Mapping[str, Any], row_id: str) -> EvalRow:
        if row_id in seen:
            raise Unusable("the id occurs in an earlier row")
        seen.add(row_id)
        row = eval_row(raw, row_id, folder, has_box=task.scorer == "grounding")
        if annotations is not None:
            if row_id not in annotations.by_id:
                raise Unusable(f"no entry for this id in {annotations.file}")
            row[annotations.field] = annotations.by_id[row_id]
        return row

    yield from _parse(root, task.evaluate, read_row)


def instruction_folder(root: Path) -> Path:
    """The one folder of instruction files in a data root, whichever way it is spelled."""
    found = [root / name for name in INSTRUCTION_FOLDERS if (root / name).is_dir()]
    if not found:
        raise DataError(Problem(root, f"no instruction folder; expected one of {', '.join(INSTRUCTION_FOLDERS)}"))
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise DataError(Problem(root, f"several instruction folders ({names}); keep the one to learn from"))
    return found[0]


def _image_folder(root: Path) -> Path:
    return Path(os.path.realpath(root / IMAGE_FOLDER))


def _rows(parsed: Iterator[Read | Problem]) -> list[TrainRow | EvalRow]:
    rows = []
    for item in parsed:
        if isinstance(item, Problem):
            raise DataError(item)
        rows.append(item.row)
    return rows


def _parse(
    root: Path, relative: str, read_row: Callable[[Mapping[str, Any], str], TrainRow | EvalRow]
) -> Iterator[Read | Problem]:
    try:
        file = instruction_folder(root) / relative
        array = _load_json(file)
    except DataError as error:
        yield error.problem
        return
    if not isinstance(array, list) or not array:
        yield Problem(file, f"expected a JSON array of rows, found {kind_of(array)}")
        return
    for index, raw in enumerate(array):
        row_id = None
        item: Read | Problem
        try:
            row_id = row_id_of(raw)
            item = Read(file, index, read_row(raw, row_id))
        except Unusable as error:
            item = Problem(file, str(error), index, row_id)
        except LostForGood as error:
            logger.warning("%s, row %d (id %s): left out, %s is lost for good", file, index, row_id, error)
            continue
        yield item


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(Problem(file, f"cannot read the file ({error.strerror})")) from error
    except json.JSONDecodeError as error:
        reason = f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise DataError(Problem(file, reason)) from error
    except UnicodeDecodeError as error:
        raise DataError(Problem(file, f"not UTF-8 text at byte {error.start}")) from error


@dataclass(frozen=True)
class Annotations:
    """What evaluation rows lack, by row id: ScienceQA's choices, or TextVQA's ten answers."""

    file: Path
    field: Literal["choices", "answers"]
    by_id: Mapping[str, list[str]]


def _read_annotations(root: Path, task: TaskSpec) -> Annotations | None:
    if task.annotations is None:
        return None
    file = root / IMAGE_FOLDER / task.annotations
    document = _load_json(file)
    try:
        if task.scorer == "scienceqa":
            by_id = {pid: [str(choice) for choice in problem["choices"]] for pid, problem in document.items()}
            return Annotations(file, "choices", by_id)
        if task.scorer == "textvqa":
            by_id = {str(entry["question_id"]): list(map(str, entry["answers"])) for entry in document["data"]}
            return Annotations(file, "answers", by_id)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(Problem(file, f"not the annotations of {task.scorer} ({error!r})")) from error
    raise DataError(Problem(file, f"annotations are read for scienceqa and textvqa, not for scorer {task.scorer}"))


def files_of(root: Path, task: TaskSpec) -> list[Path]:
    """The files that define a task: its instruction files and annotations (pictures are named in them)."""
    folder = instruction_folder(root)
    files = [folder / task.train, folder / task.evaluate]
    return files if task.annotations is None else [*files, root / IMAGE_FOLDER / task.annotations]


def raw_ids(root: Path, task: TaskSpec) -> dict[str, int | str]:
    """Id of every evaluation row to the same as it stands in the file, a number or a string, in the file's order."""
    array = _load_json(instruction_folder(root) / task.evaluate)
    return {row_id_of(raw): raw.get("question_id", raw.get("id")) for raw in array}
