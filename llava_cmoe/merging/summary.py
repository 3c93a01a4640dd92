"""Merges of several runs as one table: what each leaves out, and what that saves and costs.

How a merge is found is `merging.py`'s; where it lies, `registry/merges.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from llava_cmoe.evaluation.log import Results
from llava_cmoe.merging.store import MergeRecord
from llava_cmoe.report.summary import Shared, Summarised, check_comparable, write_between
from llava_cmoe.report.tables import markdown, number

HEADINGS = (
    *("run", "bound (nats)", "experts that stay", "expert bytes (MB)", "saved (%)"),
    *("last", "last, merged", "most that a task lost"),
)


class MergedRun(Summarised):
    """One merge, of a run of this recipe and seed."""

    run: str
    seed: int
    recipe: dict[str, Any]
    merge: MergeRecord


class MergeSummary(Shared):
    """What is the same in all runs, and the merge of each."""

    runs: tuple[MergedRun, ...]


def summarise_merges(merges: Sequence[tuple[Results, MergeRecord]]) -> MergeSummary:
    """Put finished runs and a merge of each side by side.

    Raises:
        ValueError: runs that are not finished or cannot stand in one table.
    """
    shared = set(Shared.model_fields)
    check_comparable([run for run, _ in merges], shared)
    return MergeSummary(
        **merges[0][0].model_dump(include=shared),
        runs=tuple(MergedRun(run=run.run, seed=run.seed, recipe=run.recipe, merge=merge) for run, merge in merges),
    )


def merges_markdown(summary: MergeSummary) -> str:
    """The table: a line per merge; accuracies located, in percent."""
    return markdown(HEADINGS, [_cells(run) for run in summary.runs], num_text_columns=1)


def _cells(merged: MergedRun) -> list[str]:
    merge = merged.merge
    size, accuracies = merge.expert_bytes, merge.accuracy.values()
    stay = [stand_in == expert for of_E in merge.stand_ins.values() for expert, stand_in in enumerate(of_E)]
    return [
        merged.run,
        f"{merge.bound:g}",
        f"{sum(stay)} of {len(stay)}",
        f"{size.after / 1e6:.1f} of {size.before / 1e6:.1f}",
        number(100 * (1 - size.after / size.before)),
        number(fmean(accuracy.before for accuracy in accuracies)),
        number(fmean(accuracy.after for accuracy in accuracies)),
        number(max(accuracy.before - accuracy.after for accuracy in accuracies)),
    ]


def write_merges_into(readme: Path, summary: MergeSummary) -> None:
    """Replace the generated part of a README.

    Raises:
        ValueError: the README has no such part.
    """
    write_between(readme, "merges", merges_markdown(summary))
