"""Several seeds of several methods as one summary: mean and spread of every number that the README states.

Everything comes from the runs' `results.json`; the summary is committed under `eval/results/`, and the README's table
is generated from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llava_cmoe.evaluation.log import Results
from llava_cmoe.registry.manifest import differing_keys
from llava_cmoe.report.tables import NOTHING, markdown, number

BEGIN, END = "<!-- headline: begin -->", "<!-- headline: end -->"


class _Summarised(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Summarised):
    """A number over seeds, in the order of `MethodSummary.seeds`; `std` is the sample's, 0 for a single seed."""

    mean: float
    std: float
    values: tuple[float, ...]


class MethodSummary(_Summarised):
    """One method over its seeds; a number that was not measured in every run is absent."""

    method: str
    seeds: tuple[int, ...]
    numbers: dict[str, Spread]
    recipe: dict[str, Any]
    results: tuple[dict[str, Any], ...]


class Headline(_Summarised):
    """What is the same in all runs, and every method's summary."""

    base: str
    data: str
    tasks: tuple[str, ...]
    num_samples: dict[str, int]
    protocol: str
    protocol_version: int
    versions: dict[str, str]
    methods: tuple[MethodSummary, ...]


SHARED = Headline.model_fields.keys() - {"methods"}
"""Fields of the results in which all runs must agree."""

PER_RUN = Results.model_fields.keys() - SHARED - {"format", "method", "recipe", "definitions"}
"""Fields that the summary keeps of every run."""


@dataclass(frozen=True)
class Measure:
    """A column of the README's table: its heading, and its number for one run (None where it was not measured)."""

    heading: str
    of: Callable[[Results], float | None]


def _metric(name: str) -> Callable[[Results], float | None]:
    return lambda run: run.headline.metrics[name]


def _located_right(run: Results) -> float | None:
    return run.locator.mean_accuracy if run.locator else None


def _oracle_minus_located(run: Results) -> float | None:
    last = [run.routes[route].metrics["last"] if route in run.routes else None for route in ("oracle", "located")]
    return None if last[0] is None or last[1] is None else last[0] - last[1]


def _partly_grown(run: Results) -> float | None:
    """Tasks that left some layer as it was; the first has no pool, hence no choice."""
    later = list(run.growth.values())[1:]
    return float(sum(len(grown) < len(run.sites) for grown in later)) if any(run.growth.values()) else None


def _trained_thousands(run: Results) -> float | None:
    return statistics.fmean(run.trainable_parameters.values()) / 1000 if run.trainable_parameters else None


MEASURES = {
    "immediate": Measure("immediate", _metric("immediate")),
    "last": Measure("last", _metric("last")),
    "maa": Measure("MAA", _metric("maa")),
    "bwt": Measure("BWT", _metric("bwt")),
    "located_right": Measure("located right", _located_right),
    "oracle_minus_located": Measure("oracle − located", _oracle_minus_located),
    "partly_grown": Measure("tasks that grew in fewer than all layers", _partly_grown),
    "trained_thousands": Measure("parameters trained per task (thousands)", _trained_thousands),
}


def summarise(runs: Sequence[Results]) -> Headline:
    """Group finished runs by method, in the order in which methods first occur.

    Raises:
        ValueError: a run that is not finished, or runs that cannot stand in one table: they differ in one of `SHARED`,
            or a method has several recipes, or one seed twice.
    """
    first = runs[0]
    for run in runs:
        if len(run.headline.matrix) < len(run.tasks):
            raise ValueError(
                f"{run.run}: {len(run.headline.matrix)} of {len(run.tasks)} tasks are learned; go on first"
            )
        for key in sorted(SHARED):
            if getattr(run, key) != getattr(first, key):
                raise ValueError(
                    f"runs {first.run} and {run.run} differ in {key}; their numbers cannot stand in one table"
                )
    methods = dict.fromkeys(run.method for run in runs)
    summaries = tuple(_summarise_method([run for run in runs if run.method == method]) for method in methods)
    return Headline(**first.model_dump(include=SHARED), methods=summaries)


def _summarise_method(runs: Sequence[Results]) -> MethodSummary:
    runs = sorted(runs, key=lambda run: run.seed)
    method, seeds = runs[0].method, tuple(run.seed for run in runs)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{method}: a seed occurs twice among {seeds}; the same run twice shows no spread")
    recipe, *others = ({key: value for key, value in run.recipe.items() if key != "seed"} for run in runs)
    for other in others:
        if differences := list(differing_keys(recipe, other)):
            raise ValueError(f"{method}: its recipes differ in {', '.join(differences)}; only the seed may differ")
    measured = {key: [measure.of(run) for run in runs] for key, measure in MEASURES.items()}
    return MethodSummary(
        method=method,
        seeds=seeds,
        numbers={
            key: _spread([v for v in values if v is not None]) for key, values in measured.items() if None not in values
        },
        recipe=recipe,
        results=tuple(run.model_dump(mode="json", include=PER_RUN) for run in runs),
    )


def _spread(values: Sequence[float]) -> Spread:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(mean=statistics.fmean(values), std=std, values=tuple(values))


def headline_markdown(headline: Headline) -> str:
    """The README's table: mean ± standard deviation over seeds, the mean alone where there is one seed."""

    def cell(summary: MethodSummary, key: str) -> str:
        spread = summary.numbers.get(key)
        if spread is None:
            return NOTHING
        return number(spread.mean) + (f" ± {number(spread.std)}" if len(spread.values) > 1 else "")

    headings = ["method", "seeds", *(measure.heading for measure in MEASURES.values())]
    rows = [
        [summary.method, str(len(summary.seeds)), *(cell(summary, key) for key in MEASURES)]
        for summary in headline.methods
    ]
    return markdown(headings, rows, num_text_columns=1)


def write_into(readme: Path, headline: Headline) -> None:
    """Replace the generated part of a README.

    Raises:
        ValueError: the README has no such part.
    """
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{readme}: no {BEGIN} and {END} to write the table between")
    readme.write_text(f"{before}{begin}\n{headline_markdown(headline)}\n{end}{after}")
