"""Several runs beside each other and beside published numbers: the document, its tables, what they must not be read as.

Everything stands in columns, one per run or published method, because eight tasks do not fit beside each other twice.
Which runs may be tested against each other, and the test, is `comparing.py`'s; the picture is `figures.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from rich import box
from rich.table import Table

from llava_cmoe.evaluation.bootstrap import Interval
from llava_cmoe.evaluation.log import Results
from llava_cmoe.report.published import PublishedSet
from llava_cmoe.report.summary import Summarised
from llava_cmoe.report.tables import HEADLINE_METRICS, NOTHING, markdown, notes, number, run_label, span


class Column(Summarised):
    """One run, or one published method."""

    name: str
    label: str
    base: str
    protocol: str
    data: str
    num_samples: dict[str, int]
    last: dict[str, float | None]
    """Task to its accuracy after the last one, in percent."""
    intervals: dict[str, Interval | None]
    metrics: dict[str, float | None]
    metric_intervals: dict[str, Interval | None]


class Difference(Summarised):
    """A run against the first one, paired over the questions of each of `tasks`; the mean of these if several."""

    first: str
    second: str
    tasks: tuple[str, ...]
    value: float
    """Accuracy of the second minus that of the first, after the last task, in percent points."""
    interval: Interval
    p: float
    """Two-sided, of one test; many tests at once find differences where there are none."""


class Comparison(Summarised):
    """Everything `comparison.json` holds."""

    format: Literal[1] = 1
    runs: tuple[Column, ...]
    published: tuple[Column, ...]
    source: str | None
    """Where the published numbers are from."""
    differences: tuple[Difference, ...]
    bootstrap: dict[str, Any]
    warnings: tuple[str, ...]


COMPARED = (
    *("base", "data", "tasks", "task_versions", "num_samples", "subset"),
    *("protocol", "protocol_version", "versions"),
)
"""Where two runs differ in one of these, their numbers are not of the same thing."""


def run_column(name: str, results: Results) -> Column:
    """A run's headline route."""
    route, measured = next(iter(results.routes.items()))
    intervals = measured.intervals[-1] if measured.intervals else [None] * len(results.tasks)
    return Column(
        name=name,
        label=run_label(results, route),
        base=f"{results.recipe.get('backbone', {}).get('path', 'unknown')} ({results.base[:12]})",
        protocol=f"{results.protocol} {results.protocol_version}",
        data=results.data,
        num_samples=results.num_samples,
        last=dict(zip(results.tasks, measured.matrix[-1], strict=True)),
        intervals=dict(zip(results.tasks, intervals, strict=True)),
        metrics=measured.metrics,
        metric_intervals=measured.metric_intervals,
    )


def published_columns(found: PublishedSet, tasks: Sequence[str]) -> tuple[Column, ...]:
    """The methods of a published table; its tasks get the spelling of `tasks` where only capitals differ."""
    spelling = {task.casefold(): task for task in tasks}
    names = [spelling.get(task.casefold(), task) for task in found.tasks]
    return tuple(
        Column(
            name=name,
            label="published",
            base=found.base,
            protocol=found.protocol,
            data=found.title,
            num_samples=found.samples,
            last=dict(zip(names, row.matrix()[-1], strict=True)) if row.matrix() else {},
            intervals={},
            metrics=row.all_metrics(),
            metric_intervals={},
        )
        for name, row in found.rows.items()
    )


def warnings_of(runs: Sequence[tuple[str, Results]], published: PublishedSet | None) -> Iterator[str]:
    """Whatever makes two columns another measurement of something else, one sentence each."""
    (first_name, first), *others = runs
    for name, results in others:
        for key in COMPARED:
            if getattr(first, key) != getattr(results, key):
                yield f"{first_name} and {name} differ in {key.replace('_', ' ')}"
    for name, results in runs:
        for note in notes(results, next(iter(results.routes))):
            if not note.startswith("beside"):
                yield f"{name}: {note}"
    if published is not None:
        columns = [run_column(name, results) for name, results in runs]
        yield (
            f"base: the published numbers began from {published.base}; the runs from "
            f"{', '.join(sorted({column.base for column in columns}))}"
        )
        protocols = sorted({results.protocol for _, results in runs} - {published.protocol})
        if protocols:
            yield f"protocol: published are {published.protocol}; the runs were scored by {', '.join(protocols)}"
        sequences = sorted({str(results.recipe.get("data", {}).get("sequence", "unknown")) for _, results in runs})
        yield (
            f"data: published is {published.title} on {_counted(published.samples)}; "
            f"the runs learned {', '.join(sequences)} and were asked {_counted(first.num_samples)}"
        )
        yield from (f"published {method}: {row.note}" for method, row in published.rows.items() if row.note)


def _counted(samples: dict[str, int]) -> str:
    counts = sorted(set(samples.values()))
    return f"{' or '.join(map(str, counts))} questions a task" if counts else "an unknown number of questions"


def comparison_tables(comparison: Comparison) -> list[Table]:
    """For the terminal: all columns, then the differences."""
    tables = []
    for title, headings, rows in compared_rows(comparison, "\n"):
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def comparison_markdown(comparison: Comparison) -> str:
    """The same as Markdown, followed by the source and the warnings."""
    parts = [markdown(headings, rows, num_text_columns=1) for _, headings, rows in compared_rows(comparison, " ")]
    parts += [f"Published: {comparison.source}."] if comparison.source else []
    parts += ["\n".join(f"- {warning}" for warning in comparison.warnings)] if comparison.warnings else []
    return "\n\n".join(parts)


def compared_rows(comparison: Comparison, joint: str) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and lines of each table; `joint` stands between a number and its interval."""
    columns = (*comparison.runs, *comparison.published)
    headings = ["percent", *(f"{column.name}:{joint}{column.label}" for column in columns)]
    rows = [
        [task, *(_cell(column.last.get(task), column.intervals.get(task), joint) for column in columns)]
        for task in task_names(comparison)
    ]
    rows += [
        [label, *(_cell(column.metrics.get(key), column.metric_intervals.get(key), joint) for column in columns)]
        for key, label in HEADLINE_METRICS.items()
    ]
    yield "after the last task", headings, rows
    if comparison.differences:
        pairs = list(dict.fromkeys((one.first, one.second) for one in comparison.differences))
        by_key = {(one.second, one.tasks): one for one in comparison.differences}
        what = list(dict.fromkeys(one.tasks for one in comparison.differences))
        headings = ["percent points", *(f"{second}{joint}− {first}" for first, second in pairs)]
        rows = [
            [
                names[0] if len(names) == 1 else f"mean of {len(names)}",
                *(_difference(by_key.get((second, names)), joint) for _, second in pairs),
            ]
            for names in what
        ]
        yield "differences after the last task, paired over questions", headings, rows


def task_names(comparison: Comparison) -> list[str]:
    """Every task of any column."""
    columns = (*comparison.runs, *comparison.published)
    return list(dict.fromkeys(task for column in columns for task in column.last))


def _cell(value: float | None, interval: Interval | None, joint: str) -> str:
    return number(value) if interval is None else f"{number(value)}{joint}({span(interval, digits=1)})"


def _difference(one: Difference | None, joint: str) -> str:
    if one is None:
        return NOTHING
    return f"{_cell(one.value, one.interval, joint)}{joint}p {one.p:.3f}"
