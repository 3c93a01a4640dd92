"""Everything that `llava-cmoe report` writes: the page, and beside it every figure and table as a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from llava_cmoe.evaluation.log import Results
from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.report.comparison import Comparison, compared_rows, comparison_markdown
from llava_cmoe.report.figures import draw_comparison, draw_confusion, draw_forgetting, draw_growth, draw_matrices
from llava_cmoe.report.latex import latex
from llava_cmoe.report.page import page_of
from llava_cmoe.report.page_examples import NOT_RUN
from llava_cmoe.report.paired_tests import compare
from llava_cmoe.report.reported import Reported
from llava_cmoe.report.tables import (
    METRIC_HEADINGS,
    TEXT_HEADINGS,
    matrix_markdown,
    matrix_rows,
    metric_rows,
    metrics_markdown,
)

Draw = Callable[[Path], None]


def write_report(runs: Sequence[Reported], folder: Path, root: Path | None = None) -> list[str]:
    """Write `report.html`, figures (PNG and SVG) and tables (Markdown and LaTeX); returns the files' names.

    Args:
        runs: the first is the one that others are tested against.
        folder: where everything goes.
        root: the data root, where it is not the one that the results name.

    Raises:
        RegistryError: runs that do not fit on one page.
        LogError: a file of answers that is broken.
    """
    found = compare([run.folder for run in runs], None, root, without=NOT_RUN) if len(runs) > 1 else None
    written = ["report.html"]
    write_atomically(folder / "report.html", page_of(runs, found).encode())
    for name, draw in _figures(runs, found):
        for suffix in ("png", "svg"):
            draw(folder / f"{name}.{suffix}")
            written.append(f"{name}.{suffix}")
    results = [run.results for run in runs]
    for name, text in (("tables.md", _markdown(results, found)), ("tables.tex", _latex(results, found))):
        write_atomically(folder / name, f"{text}\n".encode())
        written.append(name)
    return written


def _figures(runs: Sequence[Reported], found: Comparison | None) -> Iterator[tuple[str, Draw]]:
    results = [run.results for run in runs]
    yield "matrix", partial(draw_matrices, results)
    yield "forgetting", partial(draw_forgetting, results)
    if found is not None:
        yield "comparison", partial(draw_comparison, found)
    for one, name in zip(results, _suffixes(results), strict=True):
        if one.locator is not None:
            yield f"confusion{name}", partial(draw_confusion, one)
        if any(one.growth.values()):
            yield f"growth{name}", partial(draw_growth, one)


def _suffixes(results: Sequence[Results]) -> list[str]:
    """What tells the files of several runs apart: the run's name, with its position where two have one name."""
    names = [one.run for one in results]
    if len(names) == 1:
        return [""]
    return [f"_{name}" if names.count(name) == 1 else f"_{name}_{place}" for place, name in enumerate(names, start=1)]


def _markdown(results: Sequence[Results], found: Comparison | None) -> str:
    parts = [metrics_markdown(results)]
    for one in results:
        parts += [f"## {one.run}", matrix_markdown(one)]
    if found is not None:
        parts += ["## Side by side", comparison_markdown(found)]
    return "\n\n".join(parts)


def _latex(results: Sequence[Results], found: Comparison | None) -> str:
    parts = ["% metrics of every route (percent)", latex(METRIC_HEADINGS, metric_rows(results), len(TEXT_HEADINGS))]
    for one in results:
        headings, *rows = matrix_rows(one, next(iter(one.routes)))
        parts += [f"% accuracy matrix of {one.run}", latex(headings, rows, num_text_columns=1)]
    for title, headings, rows in compared_rows(found, " ") if found else ():
        parts += [f"% {title}", latex(headings, rows, num_text_columns=1)]
    return "\n\n".join(parts)
