"""Several methods on one sequence, each over several seeds: the headline, as a document and as tables.

The document is committed under `eval/results/`; the tables of README.md and docs/results.md are generated from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_cmoe.evaluation.log import Results
from llava_cmoe.report.summary import (
    SeedSummary,
    Shared,
    check_comparable,
    measures,
    over_seeds,
    spread,
    spread_cell,
    spread_table,
)
from llava_cmoe.report.tables import NOTHING, markdown

COLUMNS = measures(
    *("immediate", "last", "last_coin", "maa", "bwt"),
    *("located_right", "oracle_minus_located", "located_minus_random", "partly_grown", "trained_thousands"),
)
README_COLUMNS = measures("immediate", "last", "bwt", "located_right", "trained_thousands")


class Headline(Shared):
    """What is the same in all runs, and every method's summary."""

    tasks: tuple[str, ...]
    methods: tuple[SeedSummary, ...]


SHARED = Headline.model_fields.keys() - {"methods"}
"""Fields of the results in which all runs must agree."""

PER_RUN = Results.model_fields.keys() - SHARED - {"format", "method", "recipe", "definitions"}
"""Fields that the summary keeps of every run."""


def summarise(runs: Sequence[Results]) -> Headline:
    """Group finished runs by method, in the order in which methods first occur.

    Raises:
        ValueError: a run that is not finished, or runs that cannot stand in one table: they differ in one of `SHARED`,
            or a method has several recipes, or one seed twice.
    """
    check_comparable(runs, SHARED)
    summaries = tuple(
        over_seeds(method, [run for run in runs if run.method == method], COLUMNS, PER_RUN)
        for method in dict.fromkeys(run.method for run in runs)
    )
    return Headline(**runs[0].model_dump(include=SHARED), methods=summaries)


def headline_markdown(headline: Headline) -> str:
    """Every number of the headline: a line per method."""
    return spread_table("method", _by_name(headline), COLUMNS)


def readme_markdown(headline: Headline) -> str:
    """The README's table: a line per method, and below it what the numbers are of."""
    seeds = max((summary.seeds for summary in headline.methods), key=len)
    note = (
        f"*{len(headline.tasks)} tasks, protocol `{headline.protocol}`; percent and percent points, mean ± standard "
        f"deviation over the seeds {', '.join(map(str, seeds))}.*"
    )
    return f"{spread_table('method', _by_name(headline), README_COLUMNS)}\n\n{note}"


def tasks_markdown(headline: Headline) -> str:
    """Accuracy on each task after the last one: a line per method."""
    rows = []
    for summary in headline.methods:
        last_rows = [next(iter(run["routes"].values()))["matrix"][-1] for run in summary.results]
        by_task = [[value for value in values if value is not None] for values in zip(*last_rows, strict=True)]
        cells = [spread_cell(spread(values)) if len(values) == len(last_rows) else NOTHING for values in by_task]
        rows.append([summary.method, str(len(summary.seeds)), *cells])
    return markdown(["method", "seeds", *headline.tasks], rows, num_text_columns=1)


def _by_name(headline: Headline) -> dict[str, SeedSummary]:
    return {summary.method: summary for summary in headline.methods}
