"""Several seeds as one summary: mean and spread of every number, for runs that may stand in one table.

Everything comes from the runs' `results.json`. Which runs belong together is for others: those of a method
(`headline.py`), or those of a study's variant (`studies.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from llava_cmoe.evaluation.log import Results, Subset
from llava_cmoe.registry.schema import differing_keys
from llava_cmoe.report.tables import NOTHING, markdown, number, span


class Summarised(BaseModel):
    """Base of all summaries: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(Summarised):
    """A number over seeds, in the order of `SeedSummary.seeds`; `std` is the sample's, 0 for a single seed."""

    mean: float
    std: float
    values: tuple[float, ...]


class SeedSummary(Summarised):
    """Runs that differ only in their seed; a number that was not measured in every run is absent."""

    method: str
    seeds: tuple[int, ...]
    numbers: dict[str, Spread]
    recipe: dict[str, Any]
    results: tuple[dict[str, Any], ...]


class Shared(Summarised):
    """What is the same in all runs of one table."""

    base: str
    data: str
    num_samples: dict[str, int]
    subset: Subset | None = None
    protocol: str
    protocol_version: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Measure:
    """A column of a table: its heading, and its number for one run (None where it was not measured)."""

    heading: str
    of: Callable[[Results], float | None]


def _metric(name: str) -> Callable[[Results], float | None]:
    return lambda run: run.headline.metrics[name]


def _last_beside(protocol: str) -> Callable[[Results], float | None]:
    """The last mean that another protocol makes of the same answers; None unless it judges every task."""

    def last(run: Results) -> float | None:
        row = run.headline.other_protocols.get(protocol, ((None,),))[-1]
        judged = [accuracy for accuracy in row if accuracy is not None]
        return statistics.fmean(judged) if len(judged) == len(row) else None

    return last


def _located_right(run: Results) -> float | None:
    return run.locator.mean_accuracy if run.locator else None


def _words_alone(run: Results) -> float | None:
    return statistics.fmean(run.words_alone.values()) if run.words_alone else None


def _seconds(run: Results) -> list[float]:
    return [taken["total"] for taken in run.seconds.values()]


def _grown_later(run: Results) -> float | None:
    """Parameters trained in the second half of the sequence, in percent of those of the first."""
    trained = list(run.trainable_parameters.values())
    half = len(trained) // 2
    return 100 * sum(trained[-half:]) / sum(trained[:half]) if half and sum(trained[:half]) else None


def _last_of(better: str, minus: str) -> Callable[[Results], float | None]:
    """How much higher one route's last mean is than another's."""

    def difference(run: Results) -> float | None:
        last = [run.routes[route].metrics["last"] if route in run.routes else None for route in (better, minus)]
        return None if last[0] is None or last[1] is None else last[0] - last[1]

    return difference


def _share_grown(run: Results) -> float | None:
    """Percent of the pairs of a layer and a task, from the second task on, that got experts."""
    later = list(run.growth.values())[1:]
    if not later or not any(run.growth.values()):
        return None
    return 100 * sum(map(len, later)) / (len(later) * len(run.sites))


def _trained_thousands(run: Results) -> float | None:
    return statistics.fmean(run.trainable_parameters.values()) / 1000 if run.trainable_parameters else None


def _stored_kilobytes(run: Results) -> float | None:
    return sum(run.stored_bytes.values()) / 1000 if run.stored_bytes else None


MEASURES = {
    "immediate": Measure("immediate", _metric("immediate")),
    "last": Measure("last", _metric("last")),
    "last_coin": Measure("last by `coin`", _last_beside("coin")),
    "maa": Measure("MAA", _metric("maa")),
    "bwt": Measure("BWT", _metric("bwt")),
    "forgetting": Measure("forgetting", _metric("forgetting")),
    "located_right": Measure("locator accuracy", _located_right),
    "words_alone": Measure("words alone", _words_alone),
    "oracle_minus_located": Measure("oracle gap", _last_of("oracle", minus="located")),
    "located_minus_random": Measure("gain over random", _last_of("located", minus="random")),
    "share_grown": Measure("sites grown by later tasks (%)", _share_grown),
    "trained_thousands": Measure("trained parameters per task (thousands)", _trained_thousands),
    "grown_later": Measure("trained, second half of first (%)", _grown_later),
    "seconds": Measure("seconds per task", lambda run: statistics.fmean(_seconds(run)) if run.seconds else None),
    "last_of_first": Measure(
        "seconds, last task of first", lambda run: _seconds(run)[-1] / _seconds(run)[0] if run.seconds else None
    ),
    "stored_kilobytes": Measure("stored (kB)", _stored_kilobytes),
}
"""Every number that a table may state."""


def measures(*keys: str) -> dict[str, Measure]:
    """The columns of a table, in order."""
    return {key: MEASURES[key] for key in keys}


def check_comparable(runs: Sequence[Results], shared: Collection[str]) -> None:
    """Stop at runs that cannot stand in one table.

    Raises:
        ValueError: a run that is not finished, or that differs from the first one in a `shared` field.
    """
    first = runs[0]
    for run in runs:
        if not run.finished:
            raise ValueError(
                f"{run.run}: {len(run.headline.matrix)} of {len(run.tasks)} tasks are learned; go on first"
            )
        one, other = ({key: getattr(result, key) for key in shared} for result in (first, run))
        if differences := list(differing_keys(one, other)):
            raise ValueError(
                f"runs {first.run} and {run.run} differ in {', '.join(differences)}; "
                "their numbers cannot stand in one table"
            )


def over_seeds(
    label: str, runs: Sequence[Results], columns: Mapping[str, Measure], kept: Collection[str]
) -> SeedSummary:
    """Mean and spread over runs that differ only in their seed.

    Args:
        label: what the runs are called in errors.
        runs: finished, in any order.
        columns: the numbers to summarise.
        kept: fields of the results that the summary keeps of every run.

    Raises:
        ValueError: the runs have several recipes, or one seed twice.
    """
    runs = sorted(runs, key=lambda run: run.seed)
    seeds = tuple(run.seed for run in runs)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{label}: a seed occurs twice among {seeds}; the same run twice shows no spread")
    recipe, *others = ({key: value for key, value in run.recipe.items() if key != "seed"} for run in runs)
    for other in others:
        if differences := list(differing_keys(recipe, other)):
            raise ValueError(f"{label}: its recipes differ in {', '.join(differences)}; only the seed may differ")
    measured = {key: [measure.of(run) for run in runs] for key, measure in columns.items()}
    return SeedSummary(
        method=runs[0].method,
        seeds=seeds,
        numbers={
            key: spread([v for v in values if v is not None]) for key, values in measured.items() if None not in values
        },
        recipe=recipe,
        results=tuple(run.model_dump(mode="json", include=set(kept)) for run in runs),
    )


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of a number over seeds."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(mean=statistics.fmean(values), std=std, values=tuple(values))


T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom."""


def difference(one: SeedSummary, other: SeedSummary, key: str) -> Spread | None:
    """A number of one group minus that of another, seed by seed; None where no seed has both."""
    if key not in one.numbers or key not in other.numbers:
        return None
    left, right = (dict(zip(of.seeds, of.numbers[key].values, strict=True)) for of in (one, other))
    found = [value - right[seed] for seed, value in left.items() if seed in right]
    return spread(found) if found else None


def paired_interval(found: Spread) -> tuple[float, float] | None:
    """Where the mean difference over all seeds lies with 95 % confidence (paired t); None from a single seed.

    Raises:
        ValueError: more than ten seeds.
    """
    num = len(found.values)
    if num < 2:
        return None
    if num - 2 >= len(T_95):
        raise ValueError(f"{num} seeds; quantiles are known for at most {len(T_95) + 1}")
    half = T_95[num - 2] * found.std / num**0.5
    return found.mean - half, found.mean + half


def difference_cell(found: Spread | None) -> str:
    """The mean difference and its interval in brackets, which one seed has not; a dash where nothing was measured."""
    if found is None:
        return NOTHING
    around = paired_interval(found)
    return number(found.mean) + ("" if around is None else f" [{span(around, 1)}]")


def spread_cell(measured: Spread | None) -> str:
    """Mean ± standard deviation, the mean alone where there is one seed, a dash where nothing was measured."""
    if measured is None:
        return NOTHING
    return number(measured.mean) + (f" ± {number(measured.std)}" if len(measured.values) > 1 else "")


def spread_table(heading: str, groups: Mapping[str, SeedSummary], columns: Mapping[str, Measure]) -> str:
    """A Markdown table: a line per group, a column per measure."""
    headings = [heading, "seeds", *(measure.heading for measure in columns.values())]
    rows = [
        [name, str(len(summary.seeds)), *(spread_cell(summary.numbers.get(key)) for key in columns)]
        for name, summary in groups.items()
    ]
    return markdown(headings, rows, num_text_columns=1)
