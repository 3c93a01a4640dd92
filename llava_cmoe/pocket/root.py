"""Renders the pocket sequence as a data root that is there whole or not at all; what is drawn is `tasks.py`'s."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_cmoe.data.pocket_mark import mark_pocket
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.pocket.tasks import make_pocket

Progress = Callable[[str, int, int], None]
"""Called with the task, its rows done, and its rows in all."""


def make_pocket_root(
    root: Path,
    progress: Progress,
    *,
    seed: int = 0,
    train_rows: int = 2000,
    test_rows: int = 300,
    tasks: Sequence[str] | None = None,
) -> None:
    """Render beside and rename, so that a kill leaves no half of a data root; the next call begins anew.

    Args:
        root: folder to make; its parents are made, too.
        progress: called after every row.
        seed: the same seed gives the same bytes in every file.
        train_rows: training rows per task.
        test_rows: evaluation rows per task.
        tasks: names of the tasks to render; CoIN's eight when absent.

    Raises:
        DataError: the folder exists and holds something.
    """
    if root.is_dir() and any(root.iterdir()):
        raise DataError(Problem(root, "holds files already; give a new folder, or delete this one"))
    partial = root.resolve().with_name(f".{root.resolve().name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    make_pocket(partial, seed=seed, train_rows=train_rows, test_rows=test_rows, tasks=tasks, progress=progress)
    mark_pocket(partial, seed)
    partial.rename(root.resolve())
