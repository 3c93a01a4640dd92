"""Merges of runs that may stand in one table become one document; the results page makes its table from it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Lesson

from llava_cmoe.evaluation.log import read_results
from llava_cmoe.merging.store import BeforeAfter, MergeRecord
from llava_cmoe.merging.summary import summarise_merges
from llava_cmoe.report.analysis_tables import merges_section


def record(saved: float, **lost: float) -> MergeRecord:
    """Of six experts two are left out; tasks lose so many of 60 points."""
    return MergeRecord(
        parent="p",
        bound=0.02,
        stand_ins={"low": (0, 1, 0), "high": (0, -1, 2)},
        shares={"low": (0.5, 1.0, 0.5), "high": (1.0, 0.0, 1.0)},
        held_out=dict.fromkeys(lost, 9),
        loss={task: BeforeAfter(before=1.0, after=1.0) for task in lost},
        accuracy={task: BeforeAfter(before=60.0, after=60.0 - points) for task, points in lost.items()},
        expert_bytes=BeforeAfter(before=3e6, after=3e6 * (1 - saved)),
        versions={},
    )


@pytest.fixture
def run(lesson_of: Callable[..., Lesson], tmp_path: Path) -> Path:
    """A copy of a run that has rows to spare."""
    return Path(shutil.copytree(lesson_of("cmoe", "data.train_rows=18").recipe.run, tmp_path / "run"))


def test_a_line_says_what_is_saved_and_what_the_mean_and_the_worst_task_lose(run: Path, tmp_path: Path):
    results = read_results(run / "results.json")
    summary = summarise_merges([(results, record(1 / 3, colours=-1.0, sides=4.0))])
    (tmp_path / "merges.json").write_text(summary.model_dump_json())
    [line] = [line for line in merges_section(tmp_path).splitlines() if line.startswith("| run |")][1:]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("run", "0.02", "4 of 6", "2.0 of 3.0", "33.3", "60.0", "58.5", "4.0"),
    ]


def test_runs_that_cannot_stand_in_one_table_are_refused(run: Path):
    results, merge = read_results(run / "results.json"), record(0.5, colours=0.0)
    with pytest.raises(ValueError, match="differ in base"):
        summarise_merges([(results, merge), (results.model_copy(update={"base": "other"}), merge)])
