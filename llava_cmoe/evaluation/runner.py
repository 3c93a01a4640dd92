"""From a model to `results.json` in four steps: generate, extract (inside the scorers), score, aggregate.

Generating is the only step that needs the model. Scores are always computed from the answers files, so a corrected
scorer costs no generation. Who learned what, and when this is called, is left to the sequence.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset

from llava_cmoe.data.encoding import PromptRows
from llava_cmoe.data.tasks import TaskSequence
from llava_cmoe.evaluation.bootstrap import DESCRIPTION, accuracy_interval, metric_intervals
from llava_cmoe.evaluation.generate import Candidate, Processes, Questions, Route, RouteName, generate_answers
from llava_cmoe.evaluation.joining import score_by_id
from llava_cmoe.evaluation.log import (
    Answer,
    LocatorResults,
    Results,
    RouteResults,
    RunFacts,
    Subset,
    read_answers,
)
from llava_cmoe.evaluation.metrics import DEFINITIONS, all_metrics
from llava_cmoe.evaluation.scorers import PROTOCOLS, Reference, Scorer, TaskScore, get_scorer
from llava_cmoe.evaluation.scorers.base import mean
from llava_cmoe.settings.evaluation import EvaluationSettings

Measured = TypeVar("Measured")
BASE = "base"
"""Column of the confusion matrix for prompts that fit no known task."""


@dataclass(frozen=True)
class Exam:
    """What a run is asked, the same after every task.

    Attributes:
        sequence: the tasks in order.
        rows: task name to its canonical evaluation rows.
        folder: where the answers files go: `after_03/TextVQA.located.jsonl` (3: after the third task).
        settings: routes and batch size.
        seed: of the random route.
        max_pixels: largest picture that the backbone's processor is given; any when None.
        subset: which part of the questions the rows are; None if all.
    """

    sequence: TaskSequence
    rows: Mapping[str, Dataset]
    folder: Path
    settings: EvaluationSettings
    seed: int
    max_pixels: int | None = None
    subset: Subset | None = None

    def __post_init__(self) -> None:
        """A misspelt scorer, or one that lacks something, is told before anything is learned."""
        for task in self.sequence.tasks:
            get_scorer(task.scorer, self.settings)

    def answers_folder(self, after: int) -> Path:
        """Folder of one row of the matrix; `after` counts from 0."""
        return self.folder / f"after_{after + 1:02d}"

    def answers_path(self, after: int, task: int, route: RouteName) -> Path:
        """Answers file of one cell; `after` and `task` count from 0."""
        return self.answers_folder(after) / f"{self.sequence.names[task]}.{route}.jsonl"


@dataclass(frozen=True)
class Cell:
    """One cell of the accuracy matrix.

    Attributes:
        after: index of the task learned last.
        task: index of the task that was asked.
        route: whose routers answered.
        accuracy: percent.
        scores: of each row, in the rows' order; the accuracy is their mean, unless the scorer judges a task as a whole.
        detail: means of the scorer's further numbers (grounding: `iou`).
        failed: rows that could not be answered; they count as wrong.
        beside: accuracy of the same answers in percent under each other protocol that judges this task.
    """

    after: int
    task: int
    route: RouteName
    accuracy: float
    scores: tuple[float, ...]
    detail: Mapping[str, float] = field(default_factory=dict)
    failed: int = 0
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_mean(self) -> bool:
        """Whether the accuracy is a mean over questions, which drawing questions anew tells the sureness of."""
        return math.isclose(self.accuracy, 100 * mean(self.scores), abs_tol=1e-9)


def encode_questions(exam: Exam, processor: Any, keep: bool = True) -> dict[str, Questions]:
    """The exam's questions by task name, to be made once per run; a prompt is encoded when it is first asked.

    It is then kept, because every later row of the matrix asks it again; `keep=False` gives up that time where all
    pictures do not fit into memory (1.4 MB each at 336 pixels).
    """
    return {
        task.name: Questions(
            ids=tuple(exam.rows[task.name]["id"]),
            texts=tuple(turns[0]["text"] for turns in exam.rows[task.name]["turns"]),
            prompts=PromptRows(exam.rows[task.name], processor, task.geometry, keep, exam.max_pixels),
            max_new_tokens=task.max_new_tokens,
        )
        for task in exam.sequence.tasks
    }


def forget_answers(exam: Exam, after: int) -> None:
    """Remove the answers of row `after` and below, subsets' too: whoever learns that task anew makes another model."""
    for folder in (exam.folder, *exam.folder.parent.glob(f"subsets/*/{exam.folder.name}")):
        for row in range(after, len(exam.sequence.names)):
            shutil.rmtree(replace(exam, folder=folder).answers_folder(row), ignore_errors=True)


def evaluate_after(
    exam: Exam,
    questions: Mapping[str, Questions],
    candidate: Candidate,
    after: int,
    processes: Processes,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Ask every task learned so far, under every route; all processes call this together.

    What was already answered is not asked again, so calling this twice costs nothing.

    Args:
        exam: what is asked, and where the answers go.
        questions: from `encode_questions`.
        candidate: the model as it is after task `after`.
        after: index of the task learned last.
        processes: those that share the work.
        progress: called with a label, the samples done and all samples of this process.
    """
    for task, spec in enumerate(exam.sequence.tasks[: after + 1]):
        for name in exam.settings.routes:
            label = f"{spec.name} ({name})"
            generate_answers(
                candidate,
                questions[spec.name],
                Route(name, task_index=task, num_known=after + 1, seed=exam.seed),
                exam.answers_path(after, task, name),
                batch_size=exam.settings.batch_size,
                processes=processes,
                progress=partial(progress, label) if progress else None,
            )


def answered(exam: Exam, after: int) -> bool:
    """Whether every question of one row of the matrix is answered."""
    return all(
        exam.answers_path(after, task, route).exists() for task in range(after + 1) for route in exam.settings.routes
    )


def score_after(exam: Exam, after: int) -> list[Cell]:
    """Score every complete answers file of one row of the matrix; needs no model."""
    return [score_cell(exam, after, task, route) for task, route in complete(exam, after)]


def complete(exam: Exam, after: int) -> list[tuple[int, RouteName]]:
    """Task and route of every complete answers file of one row of the matrix."""
    return [
        (task, route)
        for route in exam.settings.routes
        for task in range(len(exam.sequence.names))  # answers of a task not learned yet may have been brought along
        if exam.answers_path(after, task, route).exists()
    ]


def score_cell(exam: Exam, after: int, task: int, route: RouteName) -> Cell:
    """Score one answers file."""
    spec = exam.sequence.tasks[task]
    path = exam.answers_path(after, task, route)
    answers, rows = read_answers(path), exam.rows[spec.name]
    score = score_answers(answers, rows, get_scorer(spec.scorer, exam.settings), source=str(path))
    others = [name for name in PROTOCOLS if name != exam.settings.protocol and spec.scorer in PROTOCOLS[name].scorers]
    beside = {}
    for protocol in others:
        settings = exam.settings.model_copy(update={"protocol": protocol})
        judged = score_answers(answers, rows, get_scorer(spec.scorer, settings), source=f"{path} ({protocol})")
        beside[protocol] = 100 * judged.accuracy
    failed = sum(answer.failed is not None for answer in answers)
    return Cell(after, task, route, 100 * score.accuracy, score.values, score.detail, failed, beside)


def score_answers(answers: Sequence[Answer], rows: Dataset, scorer: Scorer, source: str) -> TaskScore:
    """Scores in the rows' order, answers joined by id; `source` names the answers in errors. What failed is wrong.

    Raises:
        ValueError: an id is missing, doubled or unknown, or a row cannot be scored.
    """
    pairs = [(answer.id, answer.text) for answer in answers]
    references = (Reference.from_row(row) for row in rows)
    judged = score_by_id(pairs, references, scorer, source, fix="delete it to generate again")
    failed = {answer.id for answer in answers if answer.failed is not None}
    values = [0.0 if row_id in failed else value for row_id, value in zip(rows["id"], judged.values, strict=True)]
    return replace(judged, values=tuple(values), accuracy=judged.accuracy - mean(judged.values) + mean(values))


def aggregate(
    exam: Exam, facts: RunFacts, rows: Iterable[int], progress: Callable[[str, int, int], None] = lambda *_: None
) -> Results:
    """Everything `results.json` holds, from the answers files and what the caller knows about the run.

    Args:
        exam: what was asked.
        facts: about the run.
        rows: of the matrix, whose models the run holds; answers of a task that was deleted may still lie there.
        progress: told how many answers files are scored, and how many there are.
    """
    names, cells = exam.sequence.names, []
    places = [(after, task, route) for after in rows for task, route in complete(exam, after)]
    for number, place in enumerate(places, start=1):
        cells.append(score_cell(exam, *place))
        progress("scoring", number, len(places))
    if not cells:
        raise ValueError(f"{exam.folder}: no answers yet; evaluate the run first")
    last = max(cell.after for cell in cells)
    return Results(
        **facts.model_dump(),
        tasks=names,
        num_samples={name: len(exam.rows[name]) for name in names},
        task_versions={task.name: task.version for task in exam.sequence.tasks},
        subset=exam.subset,
        failed={
            f"{exam.answers_folder(cell.after).name}/{names[cell.task]}.{cell.route}": cell.failed
            for cell in cells
            if cell.failed
        },
        protocol=exam.settings.protocol,
        protocol_version=PROTOCOLS[exam.settings.protocol].version,
        definitions=DEFINITIONS,
        bootstrap=DESCRIPTION,
        routes={
            route: _route_results([cell for cell in cells if cell.route == route], last, len(names))
            for route in exam.settings.routes
        },
        locator=_locator_results(exam, last),
    )


def _route_results(cells: Sequence[Cell], last: int, num_tasks: int) -> RouteResults:
    matrix = _matrix({(cell.after, cell.task): cell.accuracy for cell in cells}, last, num_tasks)
    means = {(cell.after, cell.task): cell.scores for cell in cells if cell.is_mean}
    intervals = {(after, task): accuracy_interval(scores, task) for (after, task), scores in means.items()}
    metrics, whole = all_metrics(matrix), len(means) == len(cells)
    details = sorted({name for cell in cells for name in cell.detail})
    return RouteResults(
        matrix=matrix,
        detail={
            name: _matrix({(cell.after, cell.task): cell.detail.get(name) for cell in cells}, last, num_tasks)
            for name in details
        },
        metrics=metrics,
        intervals=_matrix(intervals, last, num_tasks),
        metric_intervals=metric_intervals(means, last + 1) if whole else dict.fromkeys(metrics),
        beside={
            protocol: _matrix({(cell.after, cell.task): cell.beside.get(protocol) for cell in cells}, last, num_tasks)
            for protocol in sorted({protocol for cell in cells for protocol in cell.beside})
        },
    )


def _matrix(
    values: Mapping[tuple[int, int], Measured | None], last: int, num_tasks: int
) -> tuple[tuple[Measured | None, ...], ...]:
    return tuple(tuple(values.get((after, task)) for task in range(num_tasks)) for after in range(last + 1))


def _locator_results(exam: Exam, last: int) -> LocatorResults | None:
    """Confusion after the last learned task; None unless every answered prompt of every learned task was located."""
    paths = [exam.answers_path(last, task, "located") for task in range(last + 1)]
    if "located" not in exam.settings.routes or not all(path.exists() for path in paths):
        return None
    located = [[answer.located for answer in read_answers(path) if answer.failed is None] for path in paths]
    if any(not tasks or None in tasks for tasks in located):
        return None
    choices = [*range(last + 1), -1]
    confusion = tuple(tuple(tasks.count(choice) for choice in choices) for tasks in located)
    names = exam.sequence.names[: last + 1]
    accuracy = {name: 100 * confusion[i][i] / sum(confusion[i]) for i, name in enumerate(names)}
    return LocatorResults(
        columns=(*names, BASE), confusion=confusion, accuracy=accuracy, mean_accuracy=mean(list(accuracy.values()))
    )
