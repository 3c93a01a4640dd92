"""Preflight of a data root: everything that is wrong with every file of a sequence, found before training starts.

What makes a row usable is decided in `coin.py`, what makes a picture usable in `images.py`; here all of it is listed.
Rows are looked at one by one and not kept: of a million, only ids, questions and names of pictures stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from llava_cmoe.data.check_report import CheckReport, FileCount
from llava_cmoe.data.coin import Lost, Parsed, Read, parse_eval, parse_train, read_train
from llava_cmoe.data.encoding import Encoding, SampleRows
from llava_cmoe.data.fit import Fit
from llava_cmoe.data.images import find_broken
from llava_cmoe.data.paths import eval_file, folders_in_use, train_file
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.rows import MARKER
from llava_cmoe.data.tasks import Geometry, Published, RowCount, TaskSequence, TaskSpec
from llava_cmoe.data.validation import as_questions, split

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

Question = tuple[str | None, str]
"""A picture's path and what is asked about it."""

CHUNK = 32
"""Pictures that a process opens at a time: a fraction of a second's work, and few messages."""


def check_sequence(
    root: Path,
    sequence: TaskSequence,
    progress: Progress = lambda *_: None,
    processes: int = 1,
    max_pixels: int | None = None,
    processor: Any = None,
    max_length: int | None = None,
    validation: bool = False,
) -> CheckReport:
    """Read every file of a sequence and open every picture once.

    Args:
        root: the data root.
        sequence: the tasks.
        progress: called after every file and every few pictures.
        processes: how many open pictures; 1 opens them here.
        max_pixels: largest square picture that the processor will be given; as large as they are when None.
        processor: the backbone's, which has to take every row; without it, rows are looked at for themselves.
        max_length: most tokens of a training sample, which are counted with the processor; any number when None.
        validation: whether training rows are to be asked, as of the validation split.
    """
    fit = None if processor is None else Fit(processor)
    scans: list[_Scan] = []
    overlaps: list[Problem] = []
    examples: dict[str, Read] = {}
    for number, task in enumerate(sequence.tasks):
        published = task.published or Published()
        train = _scan(_shown(root, task, train_file), task, published.train, parse_train(root, task), fit)
        progress("reading rows", 2 * number + 1, 2 * len(sequence.tasks))
        evaluate = _scan(_shown(root, task, eval_file), task, published.evaluate, parse_eval(root, task), fit)
        progress("reading rows", 2 * number + 2, 2 * len(sequence.tasks))
        overlaps += _overlaps(train, evaluate)
        if train.first is not None:
            examples[task.name] = train.first
        for scan in (train, evaluate):
            scan.questions.clear()  # the largest of what is kept
            scans.append(scan)
        if train.rows and not train.problems:
            train.problems += _of_recipe(
                root, task, Encoding(processor, task.geometry, max_pixels), max_length, validation
            )
    problems = [problem for scan in scans for problem in scan.problems]
    padded = {task.name for task in sequence.tasks if task.geometry == "pad"}
    problems += _open_all(scans, padded, max_pixels, progress, processes)
    return CheckReport(
        root=root,
        sequence=sequence.name,
        tasks=sequence.tasks,
        folders=tuple(folders_in_use(root, sequence.tasks)),
        files=tuple(scan.count() for scan in scans),
        problems=tuple(dict.fromkeys(problems)),  # one missing folder is found by every file that should be in it
        lost=tuple(lost for scan in scans for lost in scan.lost),
        overlaps=tuple(overlaps),
        examples=examples,
    )


@dataclass(slots=True)
class _Scan:
    """What has been seen of one file so far."""

    task: str
    shown: str
    published: RowCount | None
    rows: int = 0
    text_only: int = 0
    without_instruction: int = 0
    doubled_ids: list[str] = field(default_factory=list)
    unread: dict[str, None] = field(default_factory=dict)  # a set that keeps its order
    first: Read | None = None
    questions: list[tuple[Question, int, str]] = field(default_factory=list)
    pictures: dict[str, tuple[int, str]] = field(default_factory=dict)  # path -> the first row that shows it
    problems: list[Problem] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)

    @property
    def file(self) -> Path:
        assert self.first is not None, "asked for the file of no row"
        return self.first.file

    def count(self) -> FileCount:
        return FileCount(
            task=self.task,
            file=self.shown,
            rows=self.rows,
            text_only=self.text_only,
            images=len(self.pictures),
            doubled_ids=tuple(self.doubled_ids),
            without_instruction=self.without_instruction,
            problems=len(self.problems),
            unread=tuple(self.unread),
            published=self.published,
        )


def _scan(shown: str, task: TaskSpec, published: RowCount | None, parsed: Parsed, fit: Fit | None) -> _Scan:
    scan, ids = _Scan(task.name, shown, published), set[str]()
    for item in parsed:
        if isinstance(item, Problem):
            scan.problems.append(item)
        elif isinstance(item, Lost):
            scan.lost.append(item)
        elif fit is not None and (reason := fit.why_not(item.row)):
            scan.problems.append(Problem(item.file, reason, item.index, item.row["id"]))
        else:
            image, row_id = item.row["image"], item.row["id"]
            asked = [turn["text"] for turn in item.row["turns"] if turn["role"] == "user"]
            scan.first = scan.first or item
            scan.rows += 1
            scan.unread.update(dict.fromkeys(item.unread))
            scan.text_only += image is None
            if row_id in ids:
                scan.doubled_ids.append(row_id)
            scan.without_instruction += not any((task.instruction or "") in text for text in asked)
            ids.add(row_id)
            if image is not None:
                scan.pictures.setdefault(image, (item.index, row_id))
            scan.questions += [((image, text.replace(MARKER, "").strip()), item.index, row_id) for text in asked]
    return scan


def _of_recipe(
    root: Path, task: TaskSpec, encoding: Encoding, max_length: int | None, validation: bool
) -> Iterator[Problem]:
    """What a recipe demands of training rows that are sound for themselves; without demands they are not read again."""
    if max_length is None and not validation:
        return
    rows, file = read_train(root, task), train_file(root, task)
    if max_length is not None and encoding.processor is not None:
        yield from SampleRows(rows, encoding, max_length).too_long(file)
    if validation:
        try:
            as_questions(split(rows)[1], task.scorer, file)
        except DataError as error:
            yield error.problem


def _shown(root: Path, task: TaskSpec, place: Callable[[Path, TaskSpec], Path]) -> str:
    """An instruction file's name with its task's folder, as they are spelled."""
    try:
        return "/".join(place(root, task).parts[-2:])
    except DataError:  # told once, by the rows
        return (task.train if place is train_file else task.evaluate)[0]


def _overlaps(train: _Scan, evaluate: _Scan) -> Iterator[Problem]:
    learned = {question: index for question, index, _ in reversed(train.questions)}
    for question, index, row_id in evaluate.questions:
        if question in learned:
            reason = f"the same question about the same picture is learned in {train.file}, row {learned[question]}"
            yield Problem(evaluate.file, reason, index, row_id)


def _open_all(
    scans: Sequence[_Scan], padded: set[str], max_pixels: int | None, progress: Progress, processes: int
) -> Iterator[Problem]:
    """What is wrong with pictures, each blamed on the first row that shows it (and pads it, if any does)."""
    first: dict[str, tuple[_Scan, int, str]] = {}
    for scan in sorted(scans, key=lambda scan: scan.task not in padded):
        for path, (index, row_id) in scan.pictures.items():
            first.setdefault(path, (scan, index, row_id))
    pictures: list[tuple[str, Geometry, int | None]] = [
        (path, "pad" if scan.task in padded else "crop", max_pixels) for path, (scan, _, _) in first.items()
    ]
    chunks = [pictures[start : start + CHUNK] for start in range(0, len(pictures), CHUNK)]
    with _opener(processes) as opened:
        done = 0
        for chunk, reasons in zip(chunks, opened(find_broken, chunks), strict=True):
            done += len(chunk)
            progress("opening pictures", done, len(pictures))
            for path, reason in reasons.items():
                scan, index, row_id = first[path]
                yield Problem(scan.file, reason, index, row_id)


@contextmanager
def _opener(processes: int) -> Iterator[Callable[..., Iterator[dict[str, str]]]]:
    if processes == 1:
        yield map
        return
    # Not forked: a copy of a process that has threads (torch's, a progress bar's) may wait for a lock for ever.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield pool.map
