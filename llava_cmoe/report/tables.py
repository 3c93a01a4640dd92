"""Accuracy matrices and metrics as tables: rich ones for the terminal, Markdown ones for the README.

Everything comes from `results.json`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich import box
from rich.table import Table

from llava_cmoe.evaluation.log import Results

HEADLINE_METRICS = {"immediate": "immediate", "last": "last", "maa": "MAA", "bwt": "BWT"}
"""Metrics shown everywhere, with the way they are written."""

NOTHING = "–"


def matrix_table(results: Results, route: str | None = None) -> Table:
    """One run's accuracy matrix (percent): rows after task j, columns task i, the headline metrics below.

    The diagonal (each task right after learning it) is bold, so that reading down a column shows the forgetting.
    """
    name = route or next(iter(results.routes))
    measured = results.routes[name]
    table = Table(title=f"{results.run}: {run_label(results, name)}", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("after", style="bold", no_wrap=True)
    for task in results.tasks:
        table.add_column(task, justify="right")
    for j, row in enumerate(measured.matrix):
        cells = [f"[bold]{number(value)}[/bold]" if i == j else number(value) for i, value in enumerate(row)]
        table.add_row(results.tasks[j], *("" if i > j and row[i] is None else cell for i, cell in enumerate(cells)))
    table.caption = metrics_line(measured.metrics)
    table.caption_justify = "left"
    return table


def metrics_table(runs: Sequence[Results]) -> Table:
    """Several runs side by side: headline metrics of every measured route, and the mean locator accuracy."""
    table = Table(title="metrics (percent)", box=box.SIMPLE_HEAD, padding=0)
    for heading in METRIC_HEADINGS:
        is_text = heading in TEXT_HEADINGS
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=is_text)
    for row in _metric_rows(runs):
        table.add_row(*row)
    return table


def protocols_table(results: Results) -> Table | None:
    """The last row of one run's headline route under every protocol (percent); None if there is only one.

    The mean is over the tasks that all of them judge.
    """
    measured = results.headline
    if not measured.beside:
        return None
    rows = {results.protocol: measured.matrix[-1]} | {name: matrix[-1] for name, matrix in measured.beside.items()}
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
    measured = results.routes[route] if route else results.headline
    rows = [
        [results.tasks[j], *("" if i > j and value is None else number(value) for i, value in enumerate(row))]
        for j, row in enumerate(measured.matrix)
    ]
    table = markdown(["after \\ on", *results.tasks], rows, num_text_columns=1)
    return f"{table}\n\n{metrics_line(measured.metrics)}"


def metrics_markdown(runs: Sequence[Results]) -> str:
    """Several runs side by side as a Markdown table."""
    return markdown(list(METRIC_HEADINGS), _metric_rows(runs), num_text_columns=len(TEXT_HEADINGS))


def run_label(results: Results, route: str) -> str:
    """The method and, where there was more than one way to route, the route that was measured."""
    return f"{results.method} ({route} route)" if _is_routed(results) else results.method


def metrics_line(metrics: dict[str, float | None]) -> str:
    """The headline metrics in one line, e.g. `immediate 75.0 · last 74.1 · MAA 76.2 · BWT -0.9`."""
    return " · ".join(f"{label} {number(metrics[name])}" for name, label in HEADLINE_METRICS.items())


def number(value: float | None) -> str:
    """One decimal, a dash where nothing was measured."""
    # Rounding first, so that -0.04 does not print as -0.0.
    return NOTHING if value is None else f"{round(value, 1) + 0.0:.1f}"


TEXT_HEADINGS = ("run", "method", "route")
METRIC_HEADINGS = (*TEXT_HEADINGS, *HEADLINE_METRICS.values(), "located right")


def _is_routed(results: Results) -> bool:
    """A method without a locator ignores routes, so naming one would suggest a choice that was not made."""
    return results.locator is not None or len(results.routes) > 1


def _metric_rows(runs: Sequence[Results]) -> list[list[str]]:
    rows = []
    for results in runs:
        for route, measured in results.routes.items():
            located = results.locator.mean_accuracy if results.locator and route == "located" else None
            metrics = [number(measured.metrics[name]) for name in HEADLINE_METRICS]
            label = route if _is_routed(results) else NOTHING
            rows.append([results.run, results.method, label, *metrics, number(located)])
    return rows


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """A Markdown table whose first columns hold text, the others numbers."""
    rule = ["---"] * num_text_columns + ["---:"] * (len(headings) - num_text_columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))
