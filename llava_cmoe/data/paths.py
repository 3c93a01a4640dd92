"""Where the files of a task lie in a data root, whichever of its spellings a folder or file has there.

    Instructions_Original/ScienceQA/train.json     cl_dataset/ScienceQA/images/train/1/image.png

A data root is a folder that somebody downloaded, unpacked and perhaps renamed: of all spellings that a task accepts,
the one that exists counts, and two that exist are an error, as nobody could say which was meant.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.tasks import TaskSpec


def train_file(root: Path, task: TaskSpec) -> Path:
    """File of the training rows.

    Raises:
        DataError: no instruction folder, or several spellings of the file; not if the file is missing.
    """
    return _instruction_file(root, task, task.train)


def eval_file(root: Path, task: TaskSpec) -> Path:
    """File of the evaluation rows; errors as for `train_file`."""
    return _instruction_file(root, task, task.evaluate)


def annotations_file(root: Path, task: TaskSpec) -> Path | None:
    """File of the annotations; None for a task without."""
    return None if task.annotations is None else _the_one([root / name for name in task.annotations])


def files_of(root: Path, task: TaskSpec) -> list[Path]:
    """The files that define a task: its instruction files and annotations (pictures are named in them)."""
    annotations = annotations_file(root, task)
    files = [train_file(root, task), eval_file(root, task)]
    return files if annotations is None else [*files, annotations]


def train_images(root: Path, task: TaskSpec) -> Path:
    """Folder that training rows name pictures from, as it is spelled; it need not exist if no row shows a picture."""
    return _the_one([root / name for name in task.images])


def eval_images(root: Path, task: TaskSpec) -> Path:
    """The same for evaluation rows."""
    return _the_one([root / name for name in task.evaluate_images or task.images])


def _instruction_file(root: Path, task: TaskSpec, names: tuple[str, ...]) -> Path:
    folders = [root / name for name in task.folder if (root / name).is_dir()]
    if not folders:
        there = ", ".join(_folders_in(root)) or "no folder"
        expected = f"expected {task.folder[0]}" + (f" (or {', '.join(task.folder[1:])})" if task.folder[1:] else "")
        raise DataError(Problem(root, f"no instruction folder; {expected}, found {there}"))
    return _the_one([folder / name for folder in folders for name in names])


def _the_one(places: list[Path]) -> Path:
    """The place that exists; the first where none does, so that a message can name it."""
    found = {os.path.realpath(place): place for place in places if place.exists()}
    if len(found) > 1:
        first, *others = found.values()
        also = ", ".join(map(str, others))
        raise DataError(Problem(first, f"is also there as {also}; keep the one to learn from, or name it in the YAML"))
    return next(iter(found.values()), places[0])


def _folders_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def folders_in_use(root: Path, tasks: Iterable[TaskSpec]) -> list[str]:
    """How the folders of these tasks are spelled in this root, in the order of the tasks, each once."""
    spelled = [name for task in tasks for name in (*task.folder, *task.images, *(task.evaluate_images or ()))]
    return [name for name in dict.fromkeys(spelled) if (root / name).is_dir()]
