"""The tables and curves of the page as plain values: every number is one of `results.json`, or of a task's record.

How they look is for `page.html.j2` and `page.css`; a shade is a step from pale to dark on one scale, 0 to `STEPS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llava_cmoe.evaluation.bootstrap import Interval
from llava_cmoe.evaluation.log import Results
from llava_cmoe.report.figures import site_labels
from llava_cmoe.report.reported import Reported
from llava_cmoe.report.tables import HEADLINE_METRICS, NOTHING, intervals_of, notes, number, run_label, span

STEPS = 20
WIDTH, HEIGHT, EDGE = 120.0, 60.0, 5.0
"""Of a curve's drawing, in its own units."""


@dataclass(frozen=True)
class Cell:
    """One cell: its number, what stands small below, its shade if it has one, whether it is framed."""

    text: str
    below: str = ""
    shade: int | None = None
    framed: bool = False


@dataclass(frozen=True)
class Grid:
    """A table: headings (the first one names the lines), lines of a name and cells, and what is said of it."""

    key: str
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    text: str = ""
    notes: tuple[str, ...] = ()
    is_text: bool = False


@dataclass(frozen=True)
class Curve:
    """Accuracy on one task after it and every later one; `lines` are a route and its points each."""

    task: str
    spoken: str
    first: str
    last: str
    lines: tuple[tuple[str, str], ...]
    dots: tuple[tuple[float, float], ...]


def facts_grid(runs: Sequence[Reported]) -> Grid:
    """What the numbers depend on, a column per run."""
    facts = [_facts(run.results) for run in runs]
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = tuple((name, tuple(Cell(one.get(name, NOTHING)) for one in facts)) for name in names)
    return Grid("facts", "What was measured", ("", *(run.name for run in runs)), rows, is_text=True)


def _facts(results: Results) -> dict[str, str]:
    backbone, data = (results.recipe.get(part) or {} for part in ("backbone", "data"))
    counts = sorted(set(results.num_samples.values()))
    return {
        "run": results.run,
        "method": results.method,
        "seed": str(results.seed),
        "tasks": ", ".join(results.tasks),
        "base": f"{backbone.get('path', 'unknown')} ({results.base[:12]})",
        "data": f"{data.get('sequence', 'unknown')} ({results.data[:12]})",
        "questions a task": " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else NOTHING,
        "part of the questions": results.subset.words if results.subset else "all",
        "protocol": f"{results.protocol} {results.protocol_version}",
        "routes": ", ".join(results.routes),
        "processes": str(results.processes),
        "versions": ", ".join(f"{name} {version}" for name, version in results.versions.items()),
    }


def plain_grid(key: str, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], text: str = "") -> Grid:
    """A table that is text already."""
    return Grid(key, title, tuple(headings), tuple((name, tuple(map(Cell, cells))) for name, *cells in rows), text)


def run_grids(run: Reported) -> Iterator[Grid]:
    """All tables of one run that it has numbers for."""
    results = run.results
    yield matrix_grid(results)
    yield routes_grid(results)
    if results.locator is not None:
        yield confusion_grid(results)
    if any(results.growth.values()):
        yield growth_grid(results, run.probe_use)
    if results.trainable_parameters or results.stored_bytes:
        yield cost_grid(results)
    if results.seconds:
        yield seconds_grid(results)


def matrix_grid(results: Results) -> Grid:
    """The accuracy matrix of the headline route."""
    route, measured = next(iter(results.routes.items()))
    rows = []
    for j, row in enumerate(measured.matrix):
        around = intervals_of(measured, j)
        cells = tuple(
            Cell("") if value is None and i > j else _percent(value, around[i], framed=i == j)
            for i, value in enumerate(row)
        )
        rows.append((results.tasks[j], cells))
    metrics = " · ".join(f"{label} {number(measured.metrics[key])}" for key, label in HEADLINE_METRICS.items())
    text = f"{run_label(results, route)}. Accuracy in percent: a line after each learned task, a column for each task."
    said = (metrics, *notes(results, route))
    return Grid("matrix", "Accuracy matrix", ("after \\ on", *results.tasks), tuple(rows), text, said)


def routes_grid(results: Results) -> Grid:
    """Each task after the last one, by whose routers answer."""
    rows = []
    for i, task in enumerate(results.tasks):
        cells = [
            _percent(measured.matrix[-1][i], intervals_of(measured, len(measured.matrix) - 1)[i])
            for measured in results.routes.values()
        ]
        rows.append((task, tuple(cells)))
    for key, label in HEADLINE_METRICS.items():
        spans = [(measured.metrics[key], measured.metric_intervals.get(key)) for measured in results.routes.values()]
        rows.append((label, tuple(Cell(number(value), _around(interval)) for value, interval in spans)))
    text = "Accuracy in percent after the last learned task, and the metrics of each route."
    return Grid("routes", "Routes side by side", ("", *results.routes), tuple(rows), text)


def confusion_grid(results: Results) -> Grid:
    """Number of prompts by true task and located task, shaded by the share of the line."""
    assert results.locator is not None, "asked before"
    rows = []
    for task, counts in zip(results.tasks, results.locator.confusion, strict=False):
        asked = max(1, sum(counts))
        cells = (
            Cell(str(count), f"{100 * count / asked:.0f} %", _step(100 * count / asked)) if count else Cell("0")
            for count in counts
        )
        rows.append((task, (*cells, Cell(number(results.locator.accuracy.get(task))))))
    said = f"Mean locator accuracy {number(results.locator.mean_accuracy)} percent."
    if results.words_alone:
        alone = ", ".join(f"{task} {number(value)}" for task, value in results.words_alone.items())
        said += f" By the words of the question alone: {alone}."
    headings = ("prompts of \\ located at", *results.locator.columns, "accuracy (%)")
    return Grid("locator", "Locator", headings, tuple(rows), "Number of prompts, and their share of the line.", (said,))


def growth_grid(results: Results, probe_use: Mapping[str, Mapping[str, float]]) -> Grid:
    """Experts that each task added at each site, the highest layer first, with the use of probes.

    Where all sites grew alike there is one line for all.
    """
    most = max(1, *(num for sites in results.growth.values() for num in sites.values()))
    rows = []
    for site, label in reversed(list(zip(results.sites, site_labels(results.sites), strict=True))):
        cells = []
        for task in results.tasks:
            num, use = results.growth.get(task, {}).get(site, 0), probe_use.get(task, {}).get(site)
            below = "" if use is None else f"{100 * use:.1f} %"
            cells.append(Cell(f"+{num}" if num else "0", below, _step(60 * num / most) if num else None))
        rows.append((label, tuple(cells)))
    if len({cells for _, cells in rows}) == 1:
        rows = [(f"every site ({len(rows)})", rows[0][1])]
    text = "Experts added by each task (column) at each site (line)"
    text += "; below, the share of a token's slots that a probe got there." if any(probe_use.values()) else "."
    return Grid("growth", "Where experts grew", ("site", *results.tasks), tuple(rows), text)


def cost_grid(results: Results) -> Grid:
    """Parameters and bytes of each task."""
    columns = (results.trainable_parameters, results.stored_bytes)
    rows = [(task, tuple(Cell(_whole(column.get(task))) for column in columns)) for task in results.tasks]
    total = tuple(Cell(_whole(sum(column.values()) if column else None)) for column in columns)
    headings = ("", "parameters trained", "bytes stored")
    return Grid("costs", "Parameters and bytes", headings, (*rows, ("all", total)), "Probes are not counted.")


def seconds_grid(results: Results) -> Grid:
    """Wall-clock seconds of each task's phases."""
    phases = list(dict.fromkeys(phase for taken in results.seconds.values() for phase in taken))
    phases = [*(phase for phase in phases if phase != "total"), *(["total"] if "total" in phases else [])]
    rows = [
        (task, tuple(Cell(number(results.seconds.get(task, {}).get(phase))) for phase in phases))
        for task in results.tasks
    ]
    return Grid("seconds", "Seconds", ("", *phases), tuple(rows), "Wall-clock seconds of learning each task.")


def curves(results: Results) -> tuple[Curve, ...]:
    """How each task is remembered, under the located (or only) route and under the oracle's where it was measured."""
    headline = next(iter(results.routes))
    drawn = [route for route in dict.fromkeys((headline, "oracle")) if route in results.routes]
    return tuple(_curve(results, index, drawn) for index in range(len(results.headline.matrix)))


def _curve(results: Results, index: int, drawn: Sequence[str]) -> Curve:
    values = [row[index] for row in results.headline.matrix[index:]]
    known = [(place, value) for place, value in enumerate(values, start=index) if value is not None]
    lines = []
    for route in reversed(drawn):  # the headline on top
        row = enumerate((row[index] for row in results.routes[route].matrix[index:]), start=index)
        points = [_place(results, place, value) for place, value in row if value is not None]
        lines.append((route, " ".join(f"{x:.1f},{y:.1f}" for x, y in points)))
    spoken = ", ".join(f"{number(value)} after {results.tasks[place]}" for place, value in known)
    dots = tuple(_place(results, place, value) for place, value in known)
    return Curve(results.tasks[index], spoken, number(values[0]), number(values[-1]), tuple(lines), dots)


def _place(results: Results, place: int, value: float) -> tuple[float, float]:
    x = EDGE + (WIDTH - 2 * EDGE) * place / max(1, len(results.tasks) - 1)
    return round(x, 1), round(HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * value / 100, 1)


def settings_text(results: Results) -> str:
    """The resolved recipe."""
    return json.dumps(results.recipe, indent=1, ensure_ascii=False)


def _percent(value: float | None, interval: Interval | None, framed: bool = False) -> Cell:
    return Cell(number(value), _around(interval), None if value is None else _step(value), framed)


def _around(interval: Interval | None) -> str:
    return "" if interval is None else span(interval, digits=0)


def _step(percent: float) -> int:
    return round(max(0.0, min(100.0, percent)) * STEPS / 100)


def _whole(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"
