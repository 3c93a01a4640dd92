"""Accuracy matrices and metrics as tables: rich ones for the terminal, Markdown ones for the README.

Everything comes from `results.json`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean

from rich import box
from rich.table import Table

from llava_cmoe.evaluation.bootstrap import Interval
from llava_cmoe.evaluation.log import Results, RouteResults
from llava_cmoe.evaluation.metrics import missing_cells

HEADLINE_METRICS = {"immediate": "immediate", "last": "last", "maa": "MAA", "bwt": "BWT"}
"""Metrics shown everywhere, with the way they are written."""

NOTHING = "–"

NUM_NAMED = 3
"""Cells that a note spells out."""


def matrix_table(results: Results, route: str | None = None) -> Table:
    """One run's accuracy matrix (percent): rows after task j, columns task i, the headline metrics below.

    The diagonal (each task right after learning it) is bold, so that reading down a column shows the forgetting. Below
    each accuracy, its interval.
    """
    name = route or next(iter(results.routes))
    measured = results.routes[name]
    table = Table(title=f"{results.run}: {run_label(results, name)}", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("after", style="bold", no_wrap=True)
    for task in results.tasks:
        table.add_column(task, justify="right")
    for j, row in enumerate(measured.matrix):
        cells = [f"[bold]{number(value)}[/bold]" if i == j else number(value) for i, value in enumerate(row)]
        cells = [above(cell, around, digits=0) for cell, around in zip(cells, intervals_of(measured, j), strict=True)]
        table.add_row(results.tasks[j], *("" if i > j and row[i] is None else cell for i, cell in enumerate(cells)))
    table.caption = "\n".join((metrics_line(measured.metrics, measured.metric_intervals), *notes(results, name)))
    table.caption_justify = "left"
    return table


def metrics_table(runs: Sequence[Results]) -> Table:
    """Several runs side by side: headline metrics of every measured route, and the mean locator accuracy."""
    table = Table(title="metrics (percent)", box=box.SIMPLE_HEAD, padding=0)
    for heading in METRIC_HEADINGS:
        is_text = heading in TEXT_HEADINGS
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=is_text)
    for row in _metric_rows(runs, partial(above, digits=1)):
        table.add_row(*row)
    return table


def protocols_table(results: Results) -> Table | None:
    """The last row of one run's headline route under every protocol (percent); None if there is only one.

    The mean is over the tasks that all of them judge.
    """
    measured = results.headline
    if not measured.other_protocols:
        return None
    rows = {results.protocol: measured.matrix[-1]} | {
        name: matrix[-1] for name, matrix in measured.other_protocols.items()
    }
    judged = [values for values in zip(*rows.values(), strict=True) if None not in values]
    table = Table(title=f"{results.run}: the same answers under each protocol", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("protocol", style="bold", no_wrap=True)
    for task in (*results.tasks, "mean"):
        table.add_column(task, justify="right")
    for place, (name, row) in enumerate(rows.items()):
        table.add_row(name, *map(number, row), number(fmean(values[place] for values in judged)) if judged else NOTHING)
    return table


def matrix_markdown(results: Results, route: str | None = None) -> str:
    """The same matrix as a Markdown table, followed by its metrics."""
    name = route or next(iter(results.routes))
    measured = results.routes[name]
    headings, *rows = matrix_rows(results, name)
    table = markdown(headings, rows, num_text_columns=1)
    return "\n\n".join((table, metrics_line(measured.metrics, measured.metric_intervals), *notes(results, name)))


def matrix_rows(results: Results, route: str) -> list[list[str]]:
    """The matrix as text: the headings, then a line per learned task, each cell with its interval in brackets."""
    measured, rows = results.routes[route], [["after \\ on", *results.tasks]]
    for j, row in enumerate(measured.matrix):
        cells = map(_beside, map(number, row), intervals_of(measured, j))
        rows.append([results.tasks[j], *("" if i > j and row[i] is None else cell for i, cell in enumerate(cells))])
    return rows


def metrics_markdown(runs: Sequence[Results]) -> str:
    """Several runs side by side as a Markdown table."""
    return markdown(METRIC_HEADINGS, metric_rows(runs), num_text_columns=len(TEXT_HEADINGS))


def metric_rows(runs: Sequence[Results]) -> list[list[str]]:
    """The lines of that table, in the order of `METRIC_HEADINGS`."""
    return _metric_rows(runs, _beside)


def run_label(results: Results, route: str) -> str:
    """The method, where there was more than one way to route the route that was measured, and a subset's mark."""
    label = f"{results.method} ({route} route)" if _is_routed(results) else results.method
    return label + _part(results)


def metrics_line(metrics: dict[str, float | None], intervals: Mapping[str, Interval | None]) -> str:
    """The headline metrics in one line, each with its interval in brackets where it has one."""
    return " · ".join(
        f"{label} {_beside(number(metrics[name]), intervals.get(name))}" for name, label in HEADLINE_METRICS.items()
    )


def notes(results: Results, route: str) -> list[str]:
    """What has to be known beside the numbers: intervals, what is not learned yet, which cells were not measured."""
    matrix, told = results.routes[route].matrix, []
    if results.bootstrap:
        told.append(
            f"beside each number: where {results.bootstrap['level']:.0%} of bootstrap draws of the questions lie"
        )
    if unlearned := results.tasks[len(matrix) :]:
        told.append(f"not learned yet: {', '.join(unlearned)}")
    if failed := [f"{count} of {name}" for name, count in results.failed.items() if name.endswith(f".{route}")]:
        told.append(f"could not be answered, counted as wrong: {', '.join(failed)}")
    missing = missing_cells(matrix)
    if missing:
        lacking = [label for name, label in HEADLINE_METRICS.items() if name in missing]
        cells = sorted({cell for name in missing if name in HEADLINE_METRICS for cell in missing[name]})
        named = [f"{results.tasks[i]} after {results.tasks[j]}" for j, i in cells[:NUM_NAMED]]
        more = f" and {len(cells) - NUM_NAMED} more" if len(cells) > NUM_NAMED else ""
        told.append(f"no {', '.join(lacking)}: not measured are {', '.join(named)}{more}")
    return told


def span(interval: Interval, digits: int) -> str:
    """An interval, with a dash between its ends, or a `to` where a minus stands."""
    low, high = (f"{round(end, digits) + 0.0:.{digits}f}" for end in interval)
    return f"{low} to {high}" if low.startswith("-") else f"{low}–{high}"


def number(value: float | None) -> str:
    """One decimal, a dash where nothing was measured."""
    # Rounding first, so that -0.04 does not print as -0.0.
    return NOTHING if value is None else f"{round(value, 1) + 0.0:.1f}"


TEXT_HEADINGS = ("run", "method", "route")
METRIC_HEADINGS = (*TEXT_HEADINGS, *HEADLINE_METRICS.values(), "locator accuracy", "words alone")


def _beside(cell: str, interval: Interval | None) -> str:
    return cell if interval is None else f"{cell} ({span(interval, digits=1)})"


def above(cell: str, interval: Interval | None, digits: int) -> str:
    """For the terminal, where columns are narrow."""
    return cell if interval is None else f"{cell}\n[dim]{span(interval, digits)}[/dim]"


def intervals_of(measured: RouteResults, j: int) -> Sequence[Interval | None]:
    """Row j of the intervals; none in results that were written before there were any."""
    return measured.intervals[j] if measured.intervals else [None] * len(measured.matrix[j])


def _part(results: Results) -> str:
    """Marks what was not asked all questions."""
    subset = results.subset
    return "" if subset is None else f", {subset.words} (seed {subset.seed})"


def _is_routed(results: Results) -> bool:
    """A method without a locator ignores routes, so naming one would suggest a choice that was not made."""
    return results.locator is not None or len(results.routes) > 1


def _metric_rows(runs: Sequence[Results], joined: Callable[[str, Interval | None], str]) -> list[list[str]]:
    rows = []
    for results in runs:
        for route, measured in results.routes.items():
            located = results.locator.mean_accuracy if results.locator and route == "located" else None
            words = fmean(results.words_alone.values()) if located and results.words_alone else None
            around = measured.metric_intervals
            metrics = [joined(number(measured.metrics[name]), around.get(name)) for name in HEADLINE_METRICS]
            label = route if _is_routed(results) else NOTHING
            rows.append([results.run, results.method + _part(results), label, *metrics, number(located), number(words)])
    return rows


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """A Markdown table whose first columns hold text, the others numbers."""
    rule = ["---"] * num_text_columns + ["---:"] * (len(headings) - num_text_columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))
