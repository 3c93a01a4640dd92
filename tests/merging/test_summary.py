"""Merges stand in one table with what they save and cost; document, table and README agree."""

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Lesson

from llava_cmoe.evaluation.log import read_results
from llava_cmoe.merging.search import merge_run
from llava_cmoe.merging.store import BeforeAfter, MergeRecord
from llava_cmoe.merging.summary import MergeSummary, merges_markdown, summarise_merges
from llava_cmoe.report.summary import markers

SCRIPT = Path(__file__).parents[2] / "eval/merges.py"


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


def test_a_line_says_what_is_saved_and_what_the_mean_and_the_worst_task_lose(run: Path):
    results = read_results(run / "results.json")
    summary = summarise_merges([(results, record(1 / 3, colours=-1.0, sides=4.0))])
    line = merges_markdown(summary).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("run", "0.02", "4 of 6", "2.0 of 3.0", "33.3", "60.0", "58.5", "4.0"),
    ]


def test_runs_that_cannot_stand_in_one_table_are_refused(run: Path):
    results, merge = read_results(run / "results.json"), record(0.5, colours=0.0)
    with pytest.raises(ValueError, match="differ in base"):
        summarise_merges([(results, merge), (results.model_copy(update={"base": "other"}), merge)])


def test_the_script_writes_the_last_merges_and_the_readme(lesson_of, run: Path, tmp_path: Path, monkeypatch):
    recipe = lesson_of("cmoe", "data.train_rows=18").recipe.model_copy(update={"run": run})
    out, readme, (first, last) = tmp_path / "merges.json", tmp_path / "README.md", markers("merges")
    readme.write_text(f"above\n{first}\nold\n{last}\nbelow\n")

    def type_in(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["merges.py", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return int(left.value.code or 0)

    assert type_in(run, "--out", out) == 2 and not out.exists()  # nothing is merged yet
    merge_run(recipe, bound=0.0, num_rows=2)
    merge, _ = merge_run(recipe, bound=1e9, num_rows=2)
    assert type_in(run, "--out", out) == 0 and type_in("--out", out, "--readme", readme) == 0
    summary = MergeSummary.model_validate_json(out.read_bytes())
    assert [(one.run, one.seed, one.merge) for one in summary.runs] == [("run", 0, merge)]
    assert readme.read_text() == f"above\n{first}\n{merges_markdown(summary)}\n{last}\nbelow\n"
