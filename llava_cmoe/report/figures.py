"""The pictures: accuracy matrices, the locator's confusion, where experts grew, a study's variants side by side.

A run's pictures come from its `results.json`, a study's from its `study.json`. Cells go from pale to dark (`YlGnBu`):
what is forgotten fades, a measured 0 still differs from a blank cell, and the order is one of lightness, so it reads
the same with every kind of colour vision and in grey.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from numpy.typing import NDArray

from llava_cmoe.evaluation.log import Results
from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.report.comparison import Comparison, task_names
from llava_cmoe.report.studies import COLUMNS, StudySummary
from llava_cmoe.report.tables import metrics_line, run_label

COLOURS = "YlGnBu"
DPI = 160
CELL = 0.52  # inches; a cell then holds a three-digit number that is readable at the width of a README
MARKS = "osD^vPX*"
INK, PAPER, FAINT = "#1a1a1a", "#ffffff", "#8a8a8a"


def draw_matrices(runs: Sequence[Results], path: Path) -> None:
    """Accuracy matrices of each run's headline route, one panel per run, on one colour scale of 0 to 100 percent.

    Rows are "after task j", columns "on task i"; the diagonal, framed, is each task right after learning it.
    """
    num_tasks = max(len(results.tasks) for results in runs)
    figure = _figure((num_tasks * CELL + 1.5) * len(runs), num_tasks * CELL + 1.6)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, results in zip(panels, runs, strict=True):
        route, measured = next(iter(results.routes.items()))
        values = np.array(measured.matrix, dtype=float)
        _heat_map(axes, values, top=100.0)
        for index in range(len(values)):
            corner = (index - 0.5, index - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=1.6, zorder=3))
        _label(axes, rows=results.tasks[: len(values)], columns=results.tasks)
        axes.set_title(run_label(results, route), fontsize=11.5, fontweight="bold", color=INK, pad=10)
        axes.set_xlabel(metrics_line(measured.metrics, {}), fontsize=10, color=INK, labelpad=8)
    panels[0].set_ylabel("after learning", fontsize=10, color=FAINT)
    _save(figure, path)


def draw_confusion(results: Results, path: Path) -> None:
    """Which task the locator chose (columns) for the prompts of each task (rows), in percent of the row.

    Raises:
        ValueError: the run has no locator verdicts.
    """
    if results.locator is None:
        raise ValueError(f"run {results.run} has no locator verdicts: evaluate it with the route `located`")
    counts = np.array(results.locator.confusion, dtype=float)
    percent = 100 * counts / counts.sum(axis=1, keepdims=True)
    figure = _figure(counts.shape[1] * CELL + 1.7, counts.shape[0] * CELL + 1.6)
    axes = figure.subplots()
    _heat_map(axes, np.where(counts > 0, percent, np.nan), top=100.0)
    _label(axes, rows=results.tasks[: len(counts)], columns=results.locator.columns)
    axes.set_ylabel("prompts of", fontsize=10, color=FAINT)
    axes.set_title(f"{results.method}: located as", fontsize=11.5, fontweight="bold", color=INK, pad=10)
    right = f"locator accuracy: {results.locator.mean_accuracy:.1f} %"
    if results.words_alone:
        right += f", by the words alone {statistics.fmean(results.words_alone.values()):.1f} %"
    axes.set_xlabel(right, fontsize=10, color=INK, labelpad=8)
    _save(figure, path)


def draw_growth(results: Results, path: Path) -> None:
    """Experts added per layer (rows, the lowest layer at the bottom) by each task (columns).

    Raises:
        ValueError: the run's method has no sites to grow at.
    """
    if not results.sites:
        raise ValueError(f"run {results.run} has no sites: method {results.method} does not grow")
    grown = [results.growth.get(task, {}) for task in results.tasks]
    added = np.array([[task.get(site, 0) for task in grown] for site in reversed(results.sites)], dtype=float)
    figure = _figure(added.shape[1] * CELL + 1.5, added.shape[0] * CELL + 1.6)
    axes = figure.subplots()
    _heat_map(axes, np.where(added > 0, added, np.nan), top=max(added.max(), 1.0))
    _label(axes, rows=site_labels(results.sites)[::-1], columns=results.tasks)
    axes.set_title(f"{results.method}: experts added", fontsize=11.5, fontweight="bold", color=INK, pad=10)
    share = 100 * np.count_nonzero(added) / added.size
    summary = f"{int(added.sum())} experts; {share:.0f} % of (layer, task) pairs grew"
    axes.set_xlabel(summary, fontsize=10, color=INK, labelpad=8)
    _save(figure, path)


def draw_forgetting(runs: Sequence[Results], path: Path) -> None:
    """Accuracy on each task (a panel each) after it and every later task, by the headline route; a line per run."""
    tasks = list(dict.fromkeys(task for results in runs for task in results.tasks))
    across = min(len(tasks), 4)
    down = -(-len(tasks) // across)
    figure = _figure(2.2 * across + 0.8, 1.6 * down + 0.9)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flat
    colours = colormaps["viridis"](np.linspace(0, 0.88, len(runs)))
    for axes, task in zip(panels, tasks, strict=False):
        for place, (results, colour) in enumerate(zip(runs, colours, strict=True)):
            if task in results.tasks:
                index = results.tasks.index(task)
                values = np.array([row[index] for row in results.headline.matrix[index:]], dtype=float)
                look: dict[str, Any] = {"color": colour, "marker": MARKS[place % len(MARKS)], "markersize": 4}
                axes.plot(
                    np.arange(len(values)) + index + 1, values, label=results.run if task == tasks[0] else "", **look
                )
        axes.set_title(task, fontsize=9.5, color=INK)
        axes.set_xlim(0.5, len(tasks) + 0.5)
        axes.set_ylim(-3, 103)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.8)
    for axes in list(figure.axes)[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel("tasks learned", fontsize=10, color=INK)
    figure.supylabel("accuracy (%)", fontsize=10, color=INK)
    if len(runs) > 1:
        figure.legend(loc="outside upper right", fontsize=8.5, frameon=False, ncols=len(runs))
    _save(figure, path)


def draw_study(summary: StudySummary, path: Path) -> None:
    """Last mean of each variant, and the same against what it trained and stored where that differs; bars are one std.

    The names at the first panel are the legend of all: a variant keeps its mark and colour.
    """
    variants = summary.variants
    means = {
        key: [variant.numbers[key].mean for variant in variants.values() if key in variant.numbers]
        for key in ("trained_thousands", "stored_kilobytes")
    }
    costs = [key for key, known in means.items() if len(known) == len(variants) and len(set(known)) > 1]
    figure = _figure(4.6 + 3.4 * len(costs), max(2.6, 0.36 * len(variants) + 1.4))
    first, *others = figure.subplots(1, 1 + len(costs), squeeze=False)[0]
    colours = colormaps["viridis"](np.linspace(0, 0.88, len(variants)))
    for row, (variant, colour) in enumerate(zip(variants.values(), colours, strict=True)):
        last = variant.numbers["last"]
        look: dict[str, Any] = {"fmt": MARKS[row % len(MARKS)], "color": colour, "markersize": 6, "capsize": 3}
        first.errorbar(last.mean, row, xerr=last.std, **look)
        for axes, key in zip(others, costs, strict=True):
            cost = variant.numbers[key]
            axes.errorbar(cost.mean, last.mean, xerr=cost.std, yerr=last.std, **look)
    first.set_yticks(range(len(variants)), list(variants), fontsize=9.5, color=INK)
    first.set_ylim(len(variants) - 0.5, -0.5)
    first.set_xlabel("last (%)", fontsize=10, color=INK)
    for axes, key in zip(others, costs, strict=True):
        axes.set_xlabel(COLUMNS[key].heading, fontsize=10, color=INK)
        axes.set_ylabel("last (%)", fontsize=10, color=INK)
    for axes in (first, *others):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.8)
    figure.suptitle(summary.study["name"], fontsize=11.5, fontweight="bold", color=INK)
    _save(figure, path)


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Accuracy per task after the last one: filled marks for runs, with their intervals, hollow ones for published."""
    columns, tasks = (*comparison.runs, *comparison.published), task_names(comparison)
    figure = _figure(max(5.0, 1.15 * len(tasks) + 2.4), 3.6)
    axes = figure.subplots()
    colours = colormaps["viridis"](np.linspace(0, 0.88, len(columns)))
    for number, (column, colour) in enumerate(zip(columns, colours, strict=True)):
        values = np.array([column.last.get(task) for task in tasks], dtype=float)
        spans = [column.intervals.get(task) or (value, value) for task, value in zip(tasks, values, strict=True)]
        low_I, high_I = np.array(spans, dtype=float).reshape(-1, 2).T
        places = np.arange(len(tasks)) + (number + 0.5) / len(columns) * 0.7 - 0.35
        axes.errorbar(
            places, values, yerr=[(values - low_I).clip(0), (high_I - values).clip(0)], color=colour, markersize=6,
            fmt=MARKS[number % len(MARKS)], capsize=3, label=f"{column.name}: {column.label}",
            markerfacecolor=colour if column in comparison.runs else PAPER,
        )  # fmt: skip
    axes.set_xticks(range(len(tasks)), tasks, fontsize=9.5, color=INK, rotation=20)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("after the last task (%)", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.8)
    figure.legend(loc="outside right upper", fontsize=8.5, frameon=False)
    _save(figure, path)


def draw_tasks(costs: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Milliseconds of a prefill and of a decoding step against the number of tasks, from no time at all."""
    figure = _figure(7.2, 2.8)
    tasks = [int(name) for name in costs]
    for axes, part in zip(figure.subplots(1, 2), ("prefill", "decoding"), strict=True):
        axes.plot(tasks, [1000 * cost[part] for cost in costs.values()], marker="o", color=colormaps["viridis"](0.3))
        axes.set_xscale("log")
        axes.set_xticks(tasks, list(costs), fontsize=9.5, color=INK)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tasks learned", fontsize=10, color=INK)
        axes.set_ylabel(f"{part} (ms)", fontsize=10, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.8)
    _save(figure, path)


def site_label(site: str) -> str:
    """`layer 3` for `model.layers.3.mlp`, `vision 3` in a vision tower, `projector`, else the name itself."""
    if site.endswith("projector"):
        return "projector"
    match = re.search(r"\blayers\.(\d+)\b", site)
    return f"{'vision' if 'vision' in site else 'layer'} {match[1]}" if match else site


def site_labels(sites: Sequence[str]) -> list[str]:
    """The same of all sites of a run, with the last part of the name where two of them would read alike."""
    short = [site_label(site) for site in sites]
    return [
        label if short.count(label) == 1 else f"{label} {site.rsplit('.', 1)[-1]}"
        for site, label in zip(sites, short, strict=True)
    ]


def _heat_map(axes: Axes, values: NDArray[np.float64], top: float) -> None:
    """Coloured cells with their rounded number; cells that are not a number stay blank."""
    axes.imshow(np.ma.masked_invalid(values), cmap=COLOURS, vmin=0.0, vmax=top, aspect="equal")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = INK if value < 0.55 * top else PAPER
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=10.5, color=ink)
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _label(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), rows, fontsize=9.5, color=INK)
    axes.set_xticks(
        range(len(columns)), columns, fontsize=9.5, color=INK, rotation=40, ha="left", rotation_mode="anchor"
    )
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("bottom")


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, outside pyplot's global list, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    """A PNG or an SVG, as the path ends; text in an SVG is drawn as paths, so that it needs no font."""
    # No version, date or random id in the file: the same numbers give the same bytes.
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name with two dollar signs is a name
    with rc_context({"svg.hashsalt": "llava_cmoe", "svg.fonttype": "path"}):
        drawn, kind = io.BytesIO(), path.suffix.removeprefix(".")
        figure.savefig(drawn, format=kind, dpi=DPI, bbox_inches="tight", pad_inches=0.12, metadata=metadata)
    write_atomically(path, drawn.getvalue())
