"""The published numbers give the published means, and every table says where it is from."""

from pathlib import Path

import pytest
from pytest import approx

from llava_cmoe.evaluation.log import read_results
from llava_cmoe.report.comparison import published_columns, warnings_of
from llava_cmoe.report.published import PublishedRow, PublishedSet, published, published_sets
from llava_cmoe.settings.base import RecipeError

RECORDED = Path(__file__).parents[1] / "recorded/cmoe/results.json"
WITH_METRICS = [
    (name, method)
    for name, found in published_sets().items()
    for method, row in found.rows.items()
    if row.metrics and row.matrix()
]


@pytest.mark.parametrize(("name", "method"), WITH_METRICS)
def test_metrics_computed_from_the_numbers_are_those_that_were_published(name: str, method: str) -> None:
    row = published(name).rows[method]
    digits = 5e-5 if row.stages else 1e-2  # some cut digits off where others round
    computed = row.all_metrics()
    assert {metric: computed[metric] for metric in row.metrics} == approx(row.metrics, abs=digits)


def test_the_eight_task_rows_and_the_seven_task_stages_agree() -> None:
    eight, seven = published("coin_llava_7b"), published("coin_llava_7b_stages")
    for short, long in (("lora_r128", "lora"), ("moelora_8", "moelora_8")):
        stages = seven.rows[short].stages
        assert tuple(task[0] for task in stages) == eight.rows[long].immediate[1:]
        assert tuple(task[-1] for task in stages) == eight.rows[long].last[1:]


def test_a_row_measured_once_has_a_last_mean_and_nothing_that_needs_history() -> None:
    metrics = published("coin_llava_7b").rows["multitask_lora"].all_metrics()
    assert metrics["last"] == approx((56.77 + 49.35 + 95.55 + 56.65 + 53.90 + 30.09 + 59.50 + 55.65) / 8)
    assert {name for name, value in metrics.items() if value is not None} == {"last"}


def test_means_that_were_published_alone_stay_as_they_are() -> None:
    dymoe = published("llava_dymoe").rows["dymoe"].all_metrics()
    assert (dymoe["last"], dymoe["maa"], dymoe["bwt"], dymoe["immediate"]) == (57.03, 57.70, -4.67, None)


def test_every_table_names_source_base_and_protocol() -> None:
    assert all(found.source and found.base and found.protocol for found in published_sets().values())


@pytest.mark.parametrize("name", [name for name, found in published_sets().items() if found.rows])
def test_every_table_can_stand_beside_runs_and_its_notes_are_warnings(name: str) -> None:
    found = published(name)
    columns = published_columns(found, [task.upper() for task in found.tasks])
    assert [column.name for column in columns] == list(found.rows)
    for column, row in zip(columns, found.rows.values(), strict=True):
        assert column.metrics["last"] is not None
        assert list(column.last) == ([task.upper() for task in found.tasks] if row.matrix() else [])
    told = list(warnings_of([("run", read_results(RECORDED))], found))
    assert {f"published {method}: {row.note}" for method, row in found.rows.items() if row.note} <= set(told)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean coin_llava_7b"):
        published("coin_llava7b")


def test_what_has_no_rows_is_told_instead_of_shown() -> None:
    with pytest.raises(RecipeError, match=r"43\.96"):
        published("llava_cmoe")


def test_numbers_that_are_too_few_and_metrics_that_nobody_knows_are_refused() -> None:
    facts = {"title": "t", "source": "s", "base": "b", "protocol": "p", "tasks": ("a", "b")}
    with pytest.raises(ValueError, match="1 numbers for 2 tasks"):
        PublishedSet(**facts, rows={"m": PublishedRow(last=(1.0,))})
    with pytest.raises(ValueError, match="unknown metric"):
        PublishedRow(metrics={"mean": 1.0})
