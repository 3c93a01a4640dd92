"""What a check of a data root found, and what it says of it; finding is `check.py`'s job.

Problems stop training. Everything else is told and stops nothing: published files hold doubled ids and learned
questions themselves, and a part of a dataset is a dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from llava_cmoe.data.coin import Lost, Read
from llava_cmoe.data.problems import Problem
from llava_cmoe.data.tasks import RowCount, TaskSpec

NUM_NAMED = 5
"""Ids that a remark names, of however many it is about."""


@dataclass(frozen=True)
class FileCount:
    """What one instruction file holds.

    Attributes:
        task: name of the task.
        file: relative to the data root, as it is spelled there.
        rows: usable rows.
        text_only: those of them without a picture.
        images: distinct pictures.
        doubled_ids: ids of rows that an earlier row has, too.
        without_instruction: rows in which no question holds the task's instruction.
        problems: rows that cannot be used, and whatever is wrong with the file as a whole.
        published: how many rows its publisher says there are, where known.
        unread: names of the rows' fields that are notes about them, and not read.
    """

    task: str
    file: str
    rows: int
    text_only: int
    images: int
    doubled_ids: tuple[str, ...]
    without_instruction: int
    problems: int
    published: RowCount | None
    unread: tuple[str, ...] = ()

    @property
    def as_published(self) -> bool:
        """Whether the number of rows is the published one, or no number is published."""
        match self.published:
            case None:
                return True
            case (least, most):
                return least <= self.rows <= most
            case number:
                return self.rows == number


@dataclass(frozen=True)
class CheckReport:
    """Everything found in a data root.

    Attributes:
        root: the data root.
        sequence: name of the task sequence.
        tasks: its tasks.
        folders: folders of the data root that the tasks use, as they are spelled there.
        files: what each instruction file holds, in the order of the tasks.
        problems: all that is wrong; training would stop at the first.
        lost: rows that are left out, as their pictures are known to be lost everywhere.
        overlaps: evaluation rows whose question about the same picture is also a training row's. Scores on them say
            little, but published files hold some, so they do not make the data unusable.
        examples: task name to its first usable training row.
    """

    root: Path
    sequence: str
    tasks: tuple[TaskSpec, ...]
    folders: tuple[str, ...]
    files: tuple[FileCount, ...]
    problems: tuple[Problem, ...]
    lost: tuple[Lost, ...]
    overlaps: tuple[Problem, ...]
    examples: dict[str, Read]

    @property
    def ok(self) -> bool:
        """Whether training and evaluation can read everything."""
        return not self.problems


def render(report: CheckReport) -> Table:
    """The report as a table, a line per instruction file; problems and overlaps are counted, not spelled out."""
    table = Table(title=f"{report.sequence}: {report.root}")
    for heading in ("task", "file"):
        table.add_column(heading, overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    for heading in ("published", "text only", "pictures", "ids doubled", "problems"):
        table.add_column(heading, justify="right", overflow="fold")
    for count in report.files:
        style = "red" if count.problems else None if count.as_published else "yellow"
        numbers = (count.text_only, count.images, len(count.doubled_ids), count.problems)
        published = _told(count.published)
        table.add_row(count.task, count.file, f"{count.rows:,}", published, *map("{:,}".format, numbers), style=style)
    table.caption = f"{len(report.problems)} problems, {len(report.overlaps)} evaluation rows also learned"
    return table


def remarks(report: CheckReport) -> Iterator[str]:
    """What a reader of the table should know, a sentence each."""
    yield f"folders: {', '.join(report.folders) or 'none of those that the tasks use'}"
    for count in report.files:
        where = f"{count.task}: {count.file}"
        if count.rows and not count.as_published:
            yield f"{where} holds {count.rows:,} rows, published are {_told(count.published)}"
        if count.without_instruction:
            yield f"{where} holds {count.without_instruction:,} rows without the task's instruction"
        if count.doubled_ids:
            doubled = dict.fromkeys(count.doubled_ids)
            yield f"{where} holds ids more than once: {_first(list(doubled))}"
        if count.unread:
            yield f"{where} holds fields that are not read: {', '.join(count.unread)}"
    overlapping: dict[str, list[str]] = {}
    for overlap in report.overlaps:
        overlapping.setdefault(str(overlap.file), []).append(str(overlap.row_id))
    for file, ids in overlapping.items():
        yield f"{file} asks {len(ids):,} questions that are learned, which proves little: {_first(ids)}"
    for lost in report.lost:
        yield f"{lost.file}, row {lost.index} (id {lost.row_id}): left out, {lost.image} is lost for good"
    for task in report.tasks:
        for note in task.notes:
            yield f"{task.name}: {note}"


def _first(ids: Sequence[str]) -> str:
    return ", ".join(ids[:NUM_NAMED]) + (f" and {len(ids) - NUM_NAMED:,} more" if len(ids) > NUM_NAMED else "")


def _told(published: RowCount | None) -> str:
    match published:
        case None:
            return "?"
        case (least, most):
            return f"{least:,} to {most:,}"
        case number:
            return f"{number:,}"
