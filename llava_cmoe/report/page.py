"""One HTML file about runs: it opens from disk, asks nobody for anything, and holds no markup of a stranger's.

Whatever comes from a run is escaped by the template. Should something still slip through, the page's own policy lets
no script and no style run but the two whose hashes it names, and loads nothing but pictures that it holds itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.report.comparison import Comparison, compared_rows
from llava_cmoe.report.page_examples import PER_TASK, Example, examples_of, without_pictures
from llava_cmoe.report.page_grids import Grid, curves, facts_grid, plain_grid, run_grids, settings_text
from llava_cmoe.report.pages import policy_of, style_of, template_of
from llava_cmoe.report.reported import Reported
from llava_cmoe.report.tables import METRIC_HEADINGS, metric_rows

LARGEST = 2_000_000
"""Bytes of a page, at most."""

INTERVALS = "In brackets, where 95 % of bootstrap draws of the questions lie."
TESTS = (
    "Both runs are drawn the same questions; p is that of one test, and of many tests some find a difference where "
    "there is none. They speak of these models on other questions, not of other seeds."
)

HERE = Path(__file__).parent


def page_of(runs: Sequence[Reported], comparison: Comparison | None = None) -> str:
    """The page's text, of at most `LARGEST` bytes; what does not fit is left out, and the page says so.

    Raises:
        RegistryError: so many or such long runs that not even the comparison fits.
        LogError: a file of answers that is broken.
    """
    for shown, examples, note in _smaller_and_smaller(runs, examples_of(runs)):
        page = _render(runs, shown, examples, comparison, note)
        if len(page.encode()) <= LARGEST:
            return page
    raise RegistryError(f"a page of {len(runs)} runs would be larger than {LARGEST:,} bytes; give fewer of them")


def _smaller_and_smaller(
    runs: Sequence[Reported], examples: Sequence[Example]
) -> Iterator[tuple[Sequence[Reported], Sequence[Example], str]]:
    yield runs, examples, ""
    yield runs, without_pictures(examples), "Pictures are left out, as the page would be too large."
    yield runs, (), "Examples are left out, as the page would be too large."
    for num in range(len(runs) - 1, -1, -1):
        yield (
            runs[:num],
            (),
            f"Examples, and all but {num} runs' own tables, are left out: the page would be too large.",
        )


def _render(
    runs: Sequence[Reported],
    shown: Sequence[Reported],
    examples: Sequence[Example],
    comparison: Comparison | None,
    note: str,
) -> str:
    """The page with the own tables of the runs that are `shown`."""
    style = Markup(style_of(HERE / "page.css"))
    script = Markup((HERE / "page.js").read_text(encoding="utf-8"))
    several = len(runs) > 1
    return template_of(HERE / "page.html.j2").render(
        title=f"{runs[0].name}: {runs[0].results.method}" if not several else f"{len(runs)} runs side by side",
        policy=policy_of(style, script),
        style=style,
        script=script,
        facts=facts_grid(runs),
        notes=[*(found for run in runs for found in run.notes), *([note] if note else [])],
        compared=_compared(runs, comparison) if several else [],
        warnings=comparison.warnings if comparison else [],
        runs=[_own_part(run) for run in shown],
        several=several,
        examples=examples,
        example_tasks=list(dict.fromkeys(one.task for one in examples)),
        per_task=PER_TASK,
    )


def _own_part(run: Reported) -> Mapping[str, Any]:
    routes = list(run.results.routes)
    return {
        "name": run.name,
        "grids": list(run_grids(run)),
        "curves": curves(run.results),
        "has_oracle": "oracle" in routes[1:],
        "settings": settings_text(run.results),
    }


def _compared(runs: Sequence[Reported], comparison: Comparison | None) -> list[Grid]:
    named = [run.results.model_copy(update={"run": run.name}) for run in runs]
    grids = [plain_grid("metrics", "Metrics of every route (percent)", METRIC_HEADINGS, metric_rows(named))]
    texts = (INTERVALS, f"{INTERVALS} {TESTS}")
    for text, (title, headings, rows) in zip(texts, compared_rows(comparison, " ") if comparison else (), strict=False):
        grids.append(plain_grid("comparison", title[0].upper() + title[1:], headings, rows, text))
    return grids
