"""Merges of several runs as one document: what each leaves out, and what that saves and costs.

How a merge is found is `search.py`'s; where it lies, `store.py`'s; its table is `report/results_page.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_cmoe.evaluation.log import Results
from llava_cmoe.merging.store import MergeRecord
from llava_cmoe.report.summary import Shared, Summarised, check_comparable


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
