"""From scored cells to `results.json`: matrices, metrics, intervals, and the locator's confusion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from llava_cmoe.evaluation.bootstrap import DESCRIPTION, accuracy_interval, metric_intervals
from llava_cmoe.evaluation.eval_spec import EvalSpec, complete
from llava_cmoe.evaluation.log import LocatorResults, LogError, Results, RouteResults, RunFacts, read_answers
from llava_cmoe.evaluation.metrics import DEFINITIONS, all_metrics
from llava_cmoe.evaluation.scorers import PROTOCOLS
from llava_cmoe.evaluation.scorers.base import mean
from llava_cmoe.evaluation.scoring import Cell, score_cell

Measured = TypeVar("Measured")
BASE = "base"
"""Column of the confusion matrix for prompts that fit no known task."""


def aggregate(
    eval_spec: EvalSpec,
    facts: RunFacts,
    rows: Iterable[int],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Results:
    """Everything `results.json` holds, from the answers files and what the caller knows about the run.

    Args:
        eval_spec: what was asked.
        facts: about the run.
        rows: of the matrix, whose models the run holds; answers of a task that was deleted may still lie there.
        progress: called with how many answers files are scored, and how many there are.
    """
    names, cells = eval_spec.sequence.names, []
    places = [(after, task, route) for after in rows for task, route in complete(eval_spec, after)]
    for number, place in enumerate(places, start=1):
        cells.append(score_cell(eval_spec, *place))
        progress("scoring", number, len(places))
    if not cells:
        raise LogError(f"{eval_spec.folder}: no answers yet; evaluate the run first")
    last = max(cell.after for cell in cells)
    return Results(
        **facts.model_dump(),
        tasks=names,
        num_samples={name: len(eval_spec.rows[name]) for name in names},
        task_versions={task.name: task.version for task in eval_spec.sequence.tasks},
        subset=eval_spec.subset,
        failed={
            f"{eval_spec.answers_folder(cell.after).name}/{names[cell.task]}.{cell.route}": cell.failed
            for cell in cells
            if cell.failed
        },
        protocol=eval_spec.settings.protocol,
        protocol_version=PROTOCOLS[eval_spec.settings.protocol].version,
        definitions=DEFINITIONS,
        bootstrap=DESCRIPTION,
        routes={
            route: _route_results([cell for cell in cells if cell.route == route], last, len(names))
            for route in eval_spec.settings.routes
        },
        locator=_locator_results(eval_spec, last),
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
        other_protocols={
            protocol: _matrix(
                {(cell.after, cell.task): cell.other_protocols.get(protocol) for cell in cells}, last, num_tasks
            )
            for protocol in sorted({protocol for cell in cells for protocol in cell.other_protocols})
        },
    )


def _matrix(
    values: Mapping[tuple[int, int], Measured | None], last: int, num_tasks: int
) -> tuple[tuple[Measured | None, ...], ...]:
    return tuple(tuple(values.get((after, task)) for task in range(num_tasks)) for after in range(last + 1))


def _locator_results(eval_spec: EvalSpec, last: int) -> LocatorResults | None:
    """Confusion after the last learned task; None unless every answered prompt of every learned task was located."""
    paths = [eval_spec.answers_path(last, task, "located") for task in range(last + 1)]
    if "located" not in eval_spec.settings.routes or not all(path.exists() for path in paths):
        return None
    located = [[answer.located for answer in read_answers(path) if answer.failed is None] for path in paths]
    if any(not tasks or None in tasks for tasks in located):
        return None
    choices = [*range(last + 1), -1]
    confusion = tuple(tuple(tasks.count(choice) for choice in choices) for tasks in located)
    names = eval_spec.sequence.names[: last + 1]
    accuracy = {name: 100 * confusion[i][i] / sum(confusion[i]) for i, name in enumerate(names)}
    return LocatorResults(
        columns=(*names, BASE), confusion=confusion, accuracy=accuracy, mean_accuracy=mean(list(accuracy.values()))
    )
