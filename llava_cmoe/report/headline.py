"""Several seeds of several methods as one summary: mean and spread of every number that the README states.

Everything comes from the runs' `results.json`; the summary is committed under `eval/results/`, and the README's table
is generated from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llava_cmoe.evaluation.log import Results
from llava_cmoe.report.tables import markdown, number

BEGIN, END = "<!-- headline: begin -->", "<!-- headline: end -->"


class _Summarised(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Summarised):
    """A number over seeds, in the order of `MethodSummary.seeds`."""

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
    versions: dict[str, str]
    methods: tuple[MethodSummary, ...]


COLUMNS = {
    "immediate": "immediate",
    "last": "last",
    "maa": "MAA",
    "bwt": "BWT",
    "located_right": "located right",
    "oracle_minus_located": "oracle − located",
    "partly_grown": "tasks that grew in fewer than all layers",
    "mean_trainable_parameters": "trainable per task",
}
"""Numbers of the README's table, with their headings."""


def summarise(runs: Sequence[Results]) -> Headline:
    """Group runs by method, in the order in which methods first occur.

    Raises:
        ValueError: runs that cannot stand in one table: another base, data, task list, protocol or number of samples,
            or one method with several recipes.
    """
    first = runs[0]
    for run in runs:
        for key in ("base", "data", "tasks", "num_samples", "protocol", "protocol_version", "versions"):
            if getattr(run, key) != getattr(first, key):
                raise ValueError(
                    f"runs {first.run} and {run.run} differ in {key}; their numbers cannot stand in one table"
                )
    methods = []
    for name in dict.fromkeys(run.method for run in runs):
        group = sorted((run for run in runs if run.method == name), key=lambda run: run.seed)
        recipes = [{key: value for key, value in run.recipe.items() if key != "seed"} for run in group]
        if any(recipe != recipes[0] for recipe in recipes):
            raise ValueError(f"{name}: the seeds were run with different recipes; run them with one")
        measured = {key: [measure(run) for run in group] for key, measure in MEASURES.items()}
        numbers = {
            key: _spread([v for v in values if v is not None]) for key, values in measured.items() if None not in values
        }
        details = tuple(run.model_dump(mode="json", include=DETAILS) for run in group)
        methods.append(
            MethodSummary(
                method=name, seeds=tuple(run.seed for run in group), numbers=numbers, recipe=recipes[0], results=details
            )
        )
    return Headline(
        base=first.base,
        data=first.data,
        tasks=first.tasks,
        num_samples=first.num_samples,
        protocol=f"{first.protocol} v{first.protocol_version}",
        versions=first.versions,
        methods=tuple(methods),
    )


DETAILS = {
    "run",
    "seed",
    "routes",
    "locator",
    "growth",
    "trainable_parameters",
    "stored_bytes",
    "threads",
    "processes",
    "seconds",
}
"""Fields of every run's results that the summary keeps; the rest is the same in all of them."""


def _metric(name: str) -> Callable[[Results], float | None]:
    return lambda run: run.headline.metrics[name]


def _oracle_minus_located(run: Results) -> float | None:
    last = [run.routes[route].metrics["last"] if route in run.routes else None for route in ("oracle", "located")]
    return None if last[0] is None or last[1] is None else last[0] - last[1]


def _partly_grown(run: Results) -> float | None:
    """Tasks after the first that grew in fewer than all layers; the first has no pool, hence no choice."""
    later = list(run.growth.values())[1:]
    return float(sum(len(grown) < len(run.sites) for grown in later)) if run.sites and later and run.locator else None


MEASURES: dict[str, Callable[[Results], float | None]] = {
    **{name: _metric(name) for name in ("immediate", "last", "maa", "bwt")},
    "located_right": lambda run: run.locator.mean_accuracy if run.locator else None,
    "oracle_minus_located": _oracle_minus_located,
    "partly_grown": _partly_grown,
    "mean_trainable_parameters": lambda run: (
        statistics.fmean(run.trainable_parameters.values()) if run.trainable_parameters else None
    ),
}


def _spread(values: Sequence[float]) -> Spread:
    return Spread(
        mean=statistics.fmean(values), std=statistics.stdev(values) if len(values) > 1 else 0.0, values=tuple(values)
    )


def headline_markdown(headline: Headline) -> str:
    """The README's table: mean ± standard deviation over seeds."""

    def cell(summary: MethodSummary, key: str) -> str:
        spread = summary.numbers.get(key)
        if spread is None:
            return number(None)
        if key == "mean_trainable_parameters":
            return f"{spread.mean / 1e6:.2f} M"
        return number(spread.mean) if len(summary.seeds) == 1 else f"{number(spread.mean)} ± {number(spread.std)}"

    rows = [
        [summary.method, str(len(summary.seeds)), *(cell(summary, key) for key in COLUMNS)]
        for summary in headline.methods
    ]
    return markdown(["method", "seeds", *COLUMNS.values()], rows, num_text_columns=1)


def write_into(readme: Path, headline: Headline) -> None:
    """Replace the generated part of a README.

    Raises:
        ValueError: the README has no such part.
    """
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme}: no {BEGIN} … {END} to write the table between")
    readme.write_text(f"{before}{BEGIN}\n{headline_markdown(headline)}\n{END}{after}")
