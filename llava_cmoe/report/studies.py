"""A study as one document: what was varied, and mean and spread of every number per variant; its table.

Which runs a study consists of, and learning them, is `studies/`'s; pictures are `figures.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from llava_cmoe.evaluation.log import Results
from llava_cmoe.report.summary import (
    Measure,
    SeedSummary,
    Shared,
    check_comparable,
    difference,
    difference_cell,
    measures,
    over_seeds,
    spread_table,
)
from llava_cmoe.report.tables import markdown
from llava_cmoe.settings.base import first_problem, shown
from llava_cmoe.settings.names import plain_name
from llava_cmoe.settings.plain_json import parse_json

COLUMNS = measures(
    *("immediate", "last", "maa", "bwt", "located_right", "words_alone", "oracle_minus_located"),
    *("located_minus_random", "share_grown", "trained_thousands", "grown_later", "stored_kilobytes", "seconds"),
)
LAST_ON = "last on "
"""Begins the keys of the numbers of single tasks."""

PER_RUN = frozenset(
    {"run", "seed", "tasks", "sites", "growth", "trainable_parameters", "stored_bytes"}
    | {"processes", "threads", "seconds"}
)
"""Fields that the document keeps of every run; matrices and confusion stay in the run's `results.json`."""


class StudySummary(Shared):
    """What is the same in all runs, the study's settings, and every variant over its seeds."""

    format: Literal[1] = 1
    study: dict[str, Any]
    variants: dict[str, SeedSummary]

    @field_validator("study")
    @classmethod
    def _can_be_shown(cls, study: dict[str, Any]) -> dict[str, Any]:
        """A document may be a stranger's: its name becomes a file's, its settings a line below the table."""
        name = study.get("name")
        if not isinstance(name, str) or not name.strip():
            raise ValueError("`name` is no name")
        try:
            plain_name(f"study_{name}.json")
        except ValueError as error:
            raise ValueError(f"`name` is {shown(name)}: {error}") from error
        if not isinstance(study.get("recipe"), str):
            raise ValueError("`recipe` names no file")
        for key in ("common", "seeds"):
            if not isinstance(study.get(key), list):
                raise ValueError(f"`{key}` is no list")
        return study


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
        content = path.read_bytes()
        parse_json(content)
        return StudySummary.model_validate_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: not the summary of a study, format 1: {first_problem(error)}") from error


def study_markdown(summary: StudySummary) -> str:
    """Every number that any variant measured, the accuracy on each task, and recipe, overrides and seeds."""
    measured = dict.fromkeys(key for variant in summary.variants.values() for key in variant.numbers)
    columns = {key: measure for key, measure in COLUMNS.items() if key in measured}
    tasks = {key: last_on(key.removeprefix(LAST_ON)) for key in measured if key.startswith(LAST_ON)}
    study = summary.study
    changed = "".join(f", `{override}`" for override in study["common"])
    seeds = ", ".join(map(str, study["seeds"]))
    source = f"*`{study['recipe']}`{changed}; mean ± standard deviation over the seeds {seeds}.*"
    tables = [spread_table("variant", summary.variants, part) for part in (columns, tasks) if part]
    return "\n\n".join((*tables, source))


def differences_markdown(summary: StudySummary, pairs: Sequence[tuple[str, str]]) -> str:
    """What separates two variants, seed by seed: a line per pair, the first variant minus the second.

    Only seeds that both variants have count; the interval is of the paired differences. A number in which no pair
    differs has no column.
    """
    compared = {
        key: [difference(summary.variants[one], summary.variants[other], key) for one, other in pairs]
        for key in ("last", "located_right", "trained_thousands")
    }
    columns = {key: found for key, found in compared.items() if any(one and any(one.values) for one in found)}
    seeds = [len({*summary.variants[one].seeds} & {*summary.variants[other].seeds}) for one, other in pairs]
    rows = [
        [one, other, str(seeds[row]), *(difference_cell(found[row]) for found in columns.values())]
        for row, (one, other) in enumerate(pairs)
    ]
    headings = ["variant", "minus", "seeds", *(COLUMNS[key].heading for key in columns)]
    return markdown(headings, rows, num_text_columns=2)


def last_on(task: str) -> Measure:
    """Accuracy on one task after the last one."""
    return Measure(f"{LAST_ON}{task}", lambda run: run.headline.matrix[-1][run.tasks.index(task)])
