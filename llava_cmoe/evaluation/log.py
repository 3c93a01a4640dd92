"""What an evaluation leaves on disk: answers as JSON lines, and `results.json`. Judging answers is left to the scorers.

Every file appears under its name only when it is complete (written beside and renamed), so a reader never meets half
of one; the answers of an evaluation at work are in the hands of `generate.py`.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from llava_cmoe.evaluation.bootstrap import Interval
from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.provenance.invocations import MANIFEST, changed_answers, is_bound
from llava_cmoe.registry.schema import warn_once
from llava_cmoe.settings.base import first_problem, shown
from llava_cmoe.settings.evaluation import Split
from llava_cmoe.settings.names import PlainName
from llava_cmoe.settings.plain_json import parse_json

Row = tuple[float | None, ...]


@dataclass(frozen=True)
class Answer:
    """One generated answer, as one line of an answers file.

    Attributes:
        id: the evaluation row's id.
        text: what the model wrote, outer blanks removed, nothing else extracted.
        located: index of the task the locator chose, -1 for the base model; None where no locator was asked.
        score: the chosen task's score (lower means closer); None where no task was chosen.
        prompt: the user's turn as it stands in the row.
        failed: why the question could not be answered; None if it was.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    id: str
    text: str
    located: int | None
    score: float | None
    prompt: str
    failed: str | None = None

    def to_line(self) -> bytes:
        """The answer as JSON, ended by a newline (no other newline can occur in it); `failed` only where it did."""
        document = asdict(self)
        if self.failed is None:
            del document["failed"]
        return json.dumps(document, ensure_ascii=False).encode() + b"\n"


class LogError(ValueError):
    """Answers or results that cannot be used as they are; the message names file, place and fix."""


ANSWER = TypeAdapter(Answer)


def read_answers(path: Path, at_work: bool = False) -> list[Answer]:
    """Read an answers file.

    Args:
        path: of the file.
        at_work: whether it is still written to: a last line without its newline was then cut by a kill, and is left
            out.

    Raises:
        LogError: a line is not an answer, or the last one is cut.
    """
    # Split at \n only: str.splitlines would also split at U+2028, which an answer may contain.
    *lines, rest = path.read_bytes().split(b"\n")
    if rest and not at_work:
        lines.append(rest)
    answers = []
    for number, line in enumerate(lines, start=1):
        try:
            answers.append(_answer(line))
        except ValueError as error:
            raise LogError(
                f"{path}:{number}: not an answer ({first_problem(error)}); delete the file to generate it again"
            ) from error
    if rest and not at_work:
        raise LogError(f"{path}:{len(lines)}: the file ends within this line; delete it to generate it again")
    return answers


def _answer(line: bytes) -> Answer:
    parse_json(line)
    return ANSWER.validate_json(line)


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write a complete answers file atomically."""
    write_atomically(path, b"".join(answer.to_line() for answer in answers))


class _Logged(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_by_name=True)


class RunFacts(_Logged):
    """What the caller knows about a run and the evaluation does not. Mappings by task keep the tasks' order."""

    run: PlainName
    """Name of the run."""
    method: str
    """Name of the method that learned it."""
    seed: int
    """Seed of everything random in the run."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    base: str
    """Fingerprint of the frozen backbone; numbers of two bases are not comparable."""
    data: str
    """Fingerprint of the rows that were learned and evaluated."""
    data_files: dict[str, str] = {}
    """The same of each of their files, by its name in the data root; empty in a file of format 1."""
    sites: tuple[str, ...] = ()
    """Every place that may hold experts, from the lowest layer to the highest."""
    growth: dict[str, dict[str, int]] = {}
    """Task to site to the number of experts added there; sites that did not grow are absent."""
    trainable_parameters: dict[str, int] = {}
    """Parameters trained for each task (probes excluded)."""
    stored_bytes: dict[str, int] = {}
    """Bytes on disk for each task."""
    processes: int = 1
    """Processes that took part."""
    threads: int = 1
    """CPU threads of each process."""
    versions: dict[str, str] = {}
    """Python and the packages whose version can change a number."""
    words_alone: dict[str, float] = {}
    """Percent of each learned task's prompts whose words alone name the task (`word_control.py`), the control of the
    locator; empty for a method without one, and in older files."""
    seconds: dict[str, dict[str, float]] = {}
    """Wall-clock seconds: task to stage to seconds."""


class Subset(_Logged):
    """Which part of the questions was asked."""

    limit: int
    """Questions per task, at most."""
    seed: int
    """Of the draw."""
    strata: str
    """What the draw keeps the shares of."""
    of: dict[str, int]
    """Task to the number of questions there are."""
    by: Literal["evaluation.limit", "data.eval_rows", "evaluation.split"] = "evaluation.limit"
    """The setting that made it."""
    split: Split = "test"
    """Whose questions they are: with `validation`, training rows that were held out."""

    @property
    def words(self) -> str:
        """What marks a number as measured on it."""
        part = "" if self.by == "evaluation.split" else f"subset of {self.limit}"
        return ", ".join(filter(None, ("validation split" if self.split == "validation" else "", part)))


class RouteResults(_Logged):
    """What was measured under one route."""

    matrix: tuple[Row, ...]
    """Accuracy in percent; row j after learning task j, column i on task i, null where not measured."""
    detail: dict[str, tuple[Row, ...]]
    """Matrices of further means, by name (`iou`: mean IoU), as fractions of one."""
    metrics: dict[str, float | None]
    """Metrics of the matrix, in percent or percent points; their definitions stand beside the routes."""
    intervals: tuple[tuple[Interval | None, ...], ...] = ()
    """Lower and upper end of each accuracy of the matrix, by bootstrap; null for one that is no mean over questions
    (`captions`); empty in a file of format 1."""
    metric_intervals: dict[str, Interval | None] = {}
    """The same of each metric; null, too, where it rests on such an accuracy."""
    other_protocols: dict[str, tuple[Row, ...]] = Field({}, validation_alias=AliasChoices("other_protocols", "beside"))
    """The matrix under each other protocol: what it makes of the same answers, null for tasks that it does not judge;
    empty in older files."""


class LocatorResults(_Logged):
    """Which task the locator chose for which prompts, after the last task."""

    columns: tuple[str, ...]
    """Tasks that could be chosen, then `base` (no task fits)."""
    confusion: tuple[tuple[int, ...], ...]
    """Number of prompts; row: true task, column: chosen."""
    accuracy: dict[str, float]
    """Locator accuracy: percent of a task's prompts that were located at it."""
    mean_accuracy: float
    """Mean of these over the tasks."""


class Results(RunFacts):
    """Everything `results.json` holds."""

    format: Literal[1, 2] = 2
    """Version of this layout; 1 had no intervals and no hashes of single files."""
    tasks: tuple[PlainName, ...]
    """The tasks in the order in which they are learned."""
    num_samples: dict[str, int]
    """Evaluated rows per task."""
    task_versions: dict[str, int] = {}
    """Version of each task's entry; numbers of two versions are not comparable. Empty in older files."""
    subset: Subset | None = None
    """The part of the questions that these are; null where all were asked."""
    failed: dict[str, int] = {}
    """Answers file (`after_03/gqa.located`) to the number of its questions that could not be answered, where there are
    any; they count as wrong, and the file states why."""
    protocol: str
    """Scoring rules."""
    protocol_version: int
    """Their version; results of two versions are not comparable."""
    definitions: dict[str, str]
    """What the metrics mean."""
    bootstrap: dict[str, float | int | str] = {}
    """How the intervals were found; empty where there are none."""
    routes: dict[str, RouteResults]
    """Route (`located`, `oracle`, `random`) to what was measured; the first is the headline."""
    locator: LocatorResults | None
    """The locator's verdicts; null for a method that locates nothing or a run that did not ask."""

    @model_validator(mode="after")
    def _is_of_its_tasks(self) -> Self:
        num_tasks = len(self.tasks)
        if not self.routes or not num_tasks:
            raise ValueError("nothing was measured: no task, or no route")
        for name, route in self.routes.items():
            tables = {"matrix": route.matrix, "intervals": route.intervals, **route.detail, **route.other_protocols}
            for table, rows in tables.items():
                if len(rows) > num_tasks or any(len(row) != num_tasks for row in rows):
                    raise ValueError(f"{table} of route {shown(name)} is not of {num_tasks} tasks")
        return self

    @property
    def headline(self) -> RouteResults:
        """The first route's results."""
        return next(iter(self.routes.values()))

    @property
    def finished(self) -> bool:
        """Whether all tasks are learned and measured."""
        return len(self.headline.matrix) == len(self.tasks)


def write_results(path: Path, results: Results) -> None:
    """Write `results.json` atomically; the keys stand in the order of the fields above."""
    write_atomically(path, results.model_dump_json(indent=2).encode() + b"\n")


def read_results(path: Path, bound: bool = True) -> Results:
    """Read `results.json`, verified against the manifest beside it.

    Args:
        path: of the file.
        bound: whether one that the manifest does not name is an error; said in any case.

    Raises:
        LogError: not a results file of this format, or changed after it was written; or an answers file beside it was.
    """
    if not (is_written := is_bound(path)):
        if bound and is_written is False:
            raise LogError(
                f"{path}: was changed after it was written, or {MANIFEST} is another run's; `llava-cmoe eval "
                f"{path.parent}` or `llava-cmoe rescore {path.parent}` makes it again from the answers"
            )
        why = f"no {MANIFEST} names its hash" if is_written is None else f"{MANIFEST} names another hash"
        warn_once(f"{path}: {why}; what it says of the run is not verified")
    check_answers(path.parent, bound)
    try:
        content = path.read_bytes()
        parse_json(content)
        return Results.model_validate_json(content)
    except ValueError as error:
        raise LogError(f"{path}: not a results file of format 1 or 2: {first_problem(error)}") from error


def check_answers(folder: Path, bound: bool = True, rows: Container[Path] | None = None) -> None:
    """Stop, or only warn, where answers beside a folder's results are not those that they were made from.

    Args:
        folder: with `manifest.json`, `results.json` and `answers/`.
        bound: whether it is an error.
        rows: folders in `answers/` that are looked at; all if absent.

    Raises:
        LogError: names the first file that was changed.
    """
    changed = [path for path in changed_answers(folder) if rows is None or path.parent in rows]
    if changed and bound:
        others = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise LogError(
            f"{changed[0]}: was changed after it was answered{others}, or {MANIFEST} is another run's; bring it back "
            f"from a copy, or delete it and ask again with `llava-cmoe eval {folder}`, or count it as it is with "
            f"`llava-cmoe rescore {folder}`"
        )
    for path in changed:
        warn_once(f"{path}: was changed after it was answered; counted as it is now")


def comparable(results: Results) -> dict[str, Any]:
    """The results without any times: what two runs of the same recipe must have in common."""
    kept = _without_seconds(results.model_dump(mode="json"))
    assert isinstance(kept, dict)
    return kept


def _without_seconds(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_seconds(inner) for key, inner in value.items() if not key.endswith("seconds")}
    return [_without_seconds(inner) for inner in value] if isinstance(value, list) else value
