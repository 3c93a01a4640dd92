"""Tables hold every measured number, leave the upper triangle blank and fit a terminal."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from llava_cmoe.evaluation.log import LocatorResults, Results, RouteResults
from llava_cmoe.evaluation.metrics import DEFINITIONS, all_metrics
from llava_cmoe.report.tables import (
    matrix_markdown,
    matrix_table,
    metrics_markdown,
    metrics_table,
    number,
    protocols_table,
)

TASKS = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA")


def make_results(method: str, num_learned: int = 3, located: bool = False) -> Results:
    matrix = tuple(
        tuple(10.0 * j + i + 0.25 if i <= j else None for i in range(len(TASKS))) for j in range(num_learned)
    )
    learned = TASKS[:num_learned]
    locator = LocatorResults(
        columns=(*learned, "base"),
        confusion=tuple((*(9 if i == j else 0 for j in range(num_learned)), 1) for i in range(num_learned)),
        accuracy=dict.fromkeys(learned, 90.0),
        mean_accuracy=90.0,
    )
    return Results(
        run="demo", method=method, seed=0, recipe={}, base="b", data="d", tasks=TASKS,
        num_samples=dict.fromkeys(TASKS, 10), protocol="strict", protocol_version=1, definitions=DEFINITIONS,
        routes={"located": RouteResults(matrix=matrix, detail={}, metrics=all_metrics(matrix))},
        locator=locator if located else None,
    )  # fmt: skip


def printed(table: Table, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def cells(markdown_line: str) -> list[str]:
    return [cell.strip() for cell in markdown_line.strip("|").split("|")]


def test_markdown_matrix_has_a_row_per_learned_task_and_a_blank_upper_triangle() -> None:
    lines = matrix_markdown(make_results("cmoe")).splitlines()
    assert cells(lines[0]) == ["after \\ on", *TASKS]
    assert cells(lines[3]) == ["TextVQA", "10.2", "11.2", *[""] * 6]
    assert lines[5:] == ["", "immediate 11.2 · last 21.2 · MAA 10.8 · BWT 10.0"]


def test_terminal_matrix_of_eight_tasks_fits_eighty_columns_without_cutting() -> None:
    text = printed(matrix_table(make_results("cmoe", num_learned=8)))
    assert "…" not in text
    assert all(name in text for name in TASKS)
    assert "77.2" in text and "BWT" in text


def beside(results: Results, matrix: tuple) -> Results:
    route = results.headline.model_copy(update={"beside": {"coin": matrix}})
    return results.model_copy(update={"routes": {"located": route}})


def test_protocols_stand_side_by_side_with_the_mean_over_the_tasks_that_both_judge() -> None:
    results = make_results("cmoe")
    compared = protocols_table(beside(results, ((None,) * 8, (None,) * 8, (10.0, None, 30.0, *(None,) * 5))))
    assert compared is not None
    lines = [line.split() for line in printed(compared).splitlines()]
    assert ["strict", "20.2", "21.2", "22.2", *"–––––", "21.2"] in lines
    assert ["coin", "10.0", "–", "30.0", *"–––––", "20.0"] in lines


def test_protocols_of_eight_tasks_fit_eighty_columns_without_cutting() -> None:
    results = make_results("cmoe", num_learned=8)
    compared = protocols_table(beside(results, results.headline.matrix))
    assert compared is not None
    text = printed(compared)
    assert "…" not in text and all(name in text for name in (*TASKS, "mean"))


def test_a_run_under_one_protocol_alone_has_nothing_to_compare() -> None:
    assert protocols_table(make_results("cmoe")) is None


def test_a_cell_of_the_lower_triangle_that_was_not_measured_is_a_dash() -> None:
    results = make_results("joint", num_learned=2)
    matrix = ((None,) * 8, results.headline.matrix[1])
    route = RouteResults(matrix=matrix, detail={}, metrics=all_metrics(matrix))
    lines = matrix_markdown(results.model_copy(update={"routes": {"located": route}})).splitlines()
    assert cells(lines[2]) == ["ScienceQA", "–", *[""] * 7]
    assert lines[-1] == "immediate – · last 10.8 · MAA – · BWT –"


def test_several_runs_stand_side_by_side_with_locator_accuracy_where_there_is_one() -> None:
    runs = [make_results("sequential_lora"), make_results("cmoe", located=True)]
    lines = metrics_markdown(runs).splitlines()
    assert [cells(line)[1:3] + cells(line)[-1:] for line in lines[2:]] == [
        ["sequential_lora", "–", "–"],
        ["cmoe", "located", "90.0"],
    ]
    text = printed(metrics_table(runs))
    assert "sequential_lora" in text and "90.0" in text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (-0.04, "0.0"), (-0.06, "-0.1"), (100.0, "100.0")])
def test_numbers_have_one_decimal_and_no_negative_zero(value: float | None, text: str) -> None:
    assert number(value) == text
