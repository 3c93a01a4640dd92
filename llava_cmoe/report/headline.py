"""Several seeds of several methods: mean and spread of every number of the README's first table.

The summary is committed under `eval/results/`, and the table is generated from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_cmoe.evaluation.log import Results
from llava_cmoe.report.summary import (
    SeedSummary,
    Shared,
    Spread,
    check_comparable,
    markers,
    measures,
    over_seeds,
    spread_table,
    write_between,
)

__all__ = ["BEGIN", "COLUMNS", "END", "Headline", "Spread", "headline_markdown", "summarise", "write_into"]

BEGIN, END = markers("headline")

COLUMNS = measures(
    *("immediate", "last", "last_coin", "maa", "bwt"),
    *("located_right", "oracle_minus_located", "located_minus_random", "partly_grown", "trained_thousands"),
)


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
    """The README's table: a line per method."""
    return spread_table("method", {summary.method: summary for summary in headline.methods}, COLUMNS)


def write_into(readme: Path, headline: Headline) -> None:
    """Replace the generated part of a README.

    Raises:
        ValueError: the README has no such part.
    """
    write_between(readme, "headline", headline_markdown(headline))
