"""Preflight of a data root: everything that is wrong with every file of a sequence, found before training starts.

What makes a row usable is decided in `coin.py`, what makes a picture usable in `images.py`; here all of it is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from llava_cmoe.data.coin import Read, parse_eval, parse_train
from llava_cmoe.data.images import open_image
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.rows import MARKER
from llava_cmoe.data.tasks import TaskSequence

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class FileCount:
    """What one instruction file holds: usable rows, those of them without a picture, and distinct pictures."""

    task: str
    file: str
    rows: int
    text_only: int
    images: int
    problems: int


@dataclass(frozen=True)
class CheckReport:
    """Everything found in a data root.

    Attributes:
        root: the data root.
        sequence: name of the task sequence.
        files: what each instruction file holds, in the order of the tasks.
        problems: all that is wrong; training would stop at the first.
        overlaps: evaluation rows whose question about the same picture is also a training row's. Scores on them say
            little, but published files hold some, so they do not make the data unusable.
    """

    root: Path
    sequence: str
    files: tuple[FileCount, ...]
    problems: tuple[Problem, ...]
    overlaps: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether training and evaluation can read everything."""
        return not self.problems


def check_sequence(root: Path, sequence: TaskSequence, progress: Progress | None = None) -> CheckReport:
    """Read every file of a sequence and open every picture once."""
    files: list[FileCount] = []
    problems: list[Problem] = []
    overlaps: list[Problem] = []
    pictures: dict[str, Read] = {}  # path -> the first row that shows it
    for number, task in enumerate(sequence.tasks):
        train, train_problems = _sort(parse_train(root, task))
        evaluate, eval_problems = _sort(parse_eval(root, task))
        for name, rows, wrong in ((task.train, train, train_problems), (task.evaluate, evaluate, eval_problems)):
            shown = {row.row["image"]: row for row in reversed(rows) if row.row["image"] is not None}
            text_only = sum(row.row["image"] is None for row in rows)
            files.append(FileCount(task.name, name, len(rows), text_only, len(shown), len(wrong)))
            pictures = shown | pictures
            problems += wrong
        overlaps += _overlaps(train, evaluate)
        if progress is not None:
            progress("reading instruction files", number + 1, len(sequence.tasks))
    problems += _open_all(pictures, progress)
    # One missing folder is found by every file that should be in it.
    return CheckReport(root, sequence.name, tuple(files), tuple(dict.fromkeys(problems)), tuple(overlaps))


def _sort(parsed: Iterable[Read | Problem]) -> tuple[list[Read], list[Problem]]:
    rows: list[Read] = []
    problems: list[Problem] = []
    for item in parsed:
        if isinstance(item, Problem):
            problems.append(item)
        else:
            rows.append(item)
    return rows, problems


def _questions(read: Read) -> Iterator[tuple[str | None, str]]:
    for turn in read.row["turns"]:
        if turn["role"] == "user":
            yield read.row["image"], turn["text"].replace(MARKER, "").strip()


def _overlaps(train: list[Read], evaluate: list[Read]) -> Iterator[Problem]:
    learned = {question: read for read in train for question in _questions(read)}
    for read in evaluate:
        for question in _questions(read):
            if (twin := learned.get(question)) is not None:
                reason = f"the same question about the same picture is learned in {twin.file}, row {twin.index}"
                yield Problem(read.file, reason, read.index, read.row["id"])


def _open_all(pictures: dict[str, Read], progress: Progress | None) -> Iterator[Problem]:
    for number, (path, read) in enumerate(pictures.items()):
        try:
            open_image(Path(path))
        except DataError as error:
            yield Problem(read.file, str(error), read.index, read.row["id"])
        if progress is not None:
            progress("opening pictures", number + 1, len(pictures))


def render(report: CheckReport) -> Table:
    """The report as a table, a line per instruction file; problems and overlaps are counted, not spelled out."""
    table = Table(title=f"{report.sequence}: {report.root}")
    table.add_column("task")
    table.add_column("file")
    for heading in ("rows", "text only", "pictures", "problems"):
        table.add_column(heading, justify="right")
    for count in report.files:
        style = "red" if count.problems else None
        numbers = (count.rows, count.text_only, count.images, count.problems)
        table.add_row(count.task, count.file, *map(str, numbers), style=style)
    table.caption = f"{len(report.problems)} problems, {len(report.overlaps)} evaluation rows also learned"
    return table
