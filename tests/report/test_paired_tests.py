"""Runs are tested only where they answered the same questions; whatever else differs is told, not hidden."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest import approx
from tiny import Lesson

from llava_cmoe.evaluation.log import read_results
from llava_cmoe.provenance.invocations import bind_results
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.report.comparison import comparison_markdown
from llava_cmoe.report.figures import draw_comparison
from llava_cmoe.report.paired_tests import compare, paired_differences
from llava_cmoe.settings.base import RecipeError


@pytest.fixture
def runs(lesson_of: Callable[[str], Lesson], tmp_path: Path) -> list[Path]:
    """Two finished runs of two methods on the same questions."""
    return [
        Path(shutil.copytree(lesson_of(method).recipe.run, tmp_path / method)) for method in ("sequential_lora", "cmoe")
    ]


def edit(run: Path, **changes: Any) -> None:
    path = run / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    bind_results(run)


def test_a_difference_is_that_of_the_accuracies_and_pairs_the_questions() -> None:
    ours = {"a": {f"q{n}": float(n < 20) for n in range(40)}, "b": {"q0": 1.0, "q1": 0.0}}
    theirs = {"a": {f"q{n}": float(n < 30) for n in reversed(range(40))}, "b": {"q0": 1.0, "q1": 0.0}}
    first, second, mean = paired_differences("x", ours, "y", theirs, ["a", "b"])
    assert (first.value, second.value, mean.value) == (25.0, 0.0, 12.5)
    assert first.interval[0] > 10 and first.p < 0.01  # joined by id: nobody got worse
    assert (second.interval, second.p) == ((0.0, 0.0), 1.0)
    assert mean.tasks == ("a", "b") and mean.interval[0] > 5
    assert paired_differences("x", ours, "y", theirs, ["a", "b"]) == [first, second, mean]


def test_runs_stand_beside_each_other_and_are_tested(runs: list[Path], tmp_path: Path) -> None:
    comparison = compare(runs)
    assert [column.name for column in comparison.runs] == ["sequential_lora", "cmoe"]
    measured = [read_results(run / "results.json").headline for run in runs]
    assert [list(column.last.values()) for column in comparison.runs] == [list(one.matrix[-1]) for one in measured]
    assert [one.tasks for one in comparison.differences] == [("colours",), ("sides",), ("colours", "sides")]
    assert comparison.differences[-1].value == approx(measured[1].metrics["last"] - measured[0].metrics["last"])
    assert comparison.warnings == () and comparison.source is None
    for name in ("one.png", "two.png"):
        draw_comparison(comparison, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base": "another"}, "sequential_lora and cmoe differ in base"),
        ({"num_samples": {"colours": 6, "sides": 5}}, "sequential_lora and cmoe differ in num samples"),
        ({"task_versions": {"colours": 1, "sides": 2}}, "sequential_lora and cmoe differ in task versions"),
        ({"protocol": "coin"}, "sequential_lora and cmoe differ in protocol"),
        ({"versions": {"torch": "1"}}, "sequential_lora and cmoe differ in versions"),
    ],
)
def test_what_makes_runs_incomparable_is_told(runs: list[Path], changes: dict[str, Any], told: str) -> None:
    edit(runs[1], **changes)
    comparison = compare(runs)
    assert told in comparison.warnings
    assert bool(comparison.differences) == (not changes.keys() & {"protocol", "task_versions"})


def test_runs_on_other_data_are_shown_and_not_tested(runs: list[Path]) -> None:
    edit(runs[1], data="another")
    comparison = compare(runs)
    assert "sequential_lora and cmoe differ in data" in comparison.warnings and not comparison.differences
    assert any("cmoe is not tested: " in warning and "other data" in warning for warning in comparison.warnings)


def test_a_run_without_its_answers_is_shown_and_the_lost_file_named(runs: list[Path]) -> None:
    shutil.rmtree(runs[1] / "answers")
    comparison = compare(runs)
    assert len(comparison.runs) == 2 and not comparison.differences
    assert any("after_01" in warning and "is missing" in warning for warning in comparison.warnings)


def test_published_numbers_stand_beside_with_their_source_and_what_is_different(runs: list[Path]) -> None:
    comparison = compare(runs[:1], "coin_llava_7b")
    lora = next(column for column in comparison.published if column.name == "lora")
    assert lora.last["ScienceQA"] == 21.26 and lora.metrics["last"] == approx(28.74, abs=6e-3)
    assert comparison.source is not None and "CoIN" in comparison.source
    kinds = [warning.partition(":")[0] for warning in comparison.warnings]
    assert kinds == ["base", "protocol", "data"]
    table = comparison_markdown(comparison)
    assert "| OCRVQA | – | 0.2 | 55.6 | 57.1 | 60.1 |" in table and "vicuna" in table


def test_published_tasks_are_found_under_other_capitals(runs: list[Path]) -> None:
    document = (runs[0] / "results.json").read_text().replace('"colours"', '"scienceqa"').replace('"sides"', '"gqa"')
    (runs[0] / "results.json").write_text(document)
    bind_results(runs[0])
    comparison = compare(runs[:1], "coin_llava_7b")
    assert next(iter(comparison.published[0].last)) == "scienceqa" and comparison.published[0].last["gqa"] == 2.08


def test_mistakes_are_told_before_anything_is_read(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean coin_llava_7b"):
        compare(runs, "coin_llava7b")
    with pytest.raises(RegistryError, match="given twice"):
        compare([runs[0], runs[0]])
    with pytest.raises(RegistryError, match="llava-cmoe eval"):
        compare([runs[0], tmp_path / "nothing"])


def test_runs_of_one_name_are_told_apart_by_their_folders(runs: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs[0], tmp_path / "other" / "cmoe"))
    assert [column.name for column in compare([runs[1], other]).runs] == [f"{tmp_path.name}/cmoe", "other/cmoe"]
