"""A study as one document: what was varied, and mean and spread of every number per variant; its table.

Which runs a study consists of, and learning them, is `studies/`'s; pictures are `figures.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from llava_cmoe.evaluation.log import Results
from llava_cmoe.report.summary import (
    Measure,
    SeedSummary,
    Shared,
    check_comparable,
    measures,
    over_seeds,
    spread_table,
    write_between,
)

COLUMNS = measures(
    *("immediate", "last", "maa", "bwt", "located_right", "oracle_minus_located", "located_minus_random"),
    *("share_grown", "trained_thousands", "stored_kilobytes"),
)
LAST_ON = "last on "
"""Begins the keys of the numbers of single tasks."""

PER_RUN = frozenset(
    {"run", "seed", "tasks", "sites", "growth", "trainable_parameters", "stored_bytes"}
    | {"processes", "threads", "seconds"}
)
"""Fields that the document keeps of every run; matrices and confusion stay in the run's `results.json`."""


class StudySummary(Shared):
    """What is the same in all runs, the study as it was asked for, and every variant over its seeds."""

    format: Literal[1] = 1
    study: dict[str, Any]
    variants: dict[str, SeedSummary]


def summarise_study(study: Mapping[str, Any], runs: Mapping[str, Sequence[Results]]) -> StudySummary:
    """Summarise each variant's finished runs; the tasks' order may differ between variants, nothing else of `Shared`.

    Args:
        study: the study's settings, as JSON.
        runs: variant to its runs.

    Raises:
        ValueError: runs that are not finished or cannot stand in one table.
    """
    everything = [run for group in runs.values() for run in group]
    shared = set(Shared.model_fields)
    check_comparable(everything, shared)
    columns = {**COLUMNS, **{f"{LAST_ON}{task}": last_on(task) for task in everything[0].num_samples}}
    return StudySummary(
        **everything[0].model_dump(include=shared),
        study=dict(study),
        variants={variant: over_seeds(variant, group, columns, PER_RUN) for variant, group in runs.items()},
    )


def read_study(path: Path) -> StudySummary:
    """Read a `study.json`.

    Raises:
        ValueError: not a study's document of this format.
    """
    try:
        return StudySummary.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: not the summary of a study, format 1: {error}") from error


def study_markdown(summary: StudySummary) -> str:
    """Whatever any variant measured, then the accuracy on each task, then a sentence that says on what it was asked."""
    measured = dict.fromkeys(key for variant in summary.variants.values() for key in variant.numbers)
    columns = {key: measure for key, measure in COLUMNS.items() if key in measured}
    tasks = {key: last_on(key.removeprefix(LAST_ON)) for key in measured if key.startswith(LAST_ON)}
    study = summary.study
    changed = "".join(f", `{override}`" for override in study["common"])
    seeds = ", ".join(map(str, study["seeds"]))
    source = f"*`{study['recipe']}`{changed}; mean ± standard deviation over the seeds {seeds}.*"
    tables = [spread_table("variant", summary.variants, part) for part in (columns, tasks) if part]
    return "\n\n".join((*tables, source))


def last_on(task: str) -> Measure:
    """Accuracy on one task after the last one."""
    return Measure(f"{LAST_ON}{task}", lambda run: run.headline.matrix[-1][run.tasks.index(task)])


def write_study_into(readme: Path, summary: StudySummary) -> None:
    """Replace the part of a README that is generated from this study, `<!-- study NAME: begin -->` to its end.

    Raises:
        ValueError: the README has no such part.
    """
    write_between(readme, f"study {summary.study['name']}", study_markdown(summary))
