"""Tables hold every measured number, leave the upper triangle blank and fit a terminal."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from llava_cmoe.evaluation.bootstrap import DESCRIPTION
from llava_cmoe.evaluation.log import LocatorResults, Results, RouteResults, Subset
from llava_cmoe.evaluation.metrics import DEFINITIONS, all_metrics
from llava_cmoe.report.tables import (
    matrix_markdown,
    matrix_table,
    metrics_markdown,
    metrics_table,
    notes,
    number,
    protocols_table,
    run_label,
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
    assert lines[5:7] == ["", "immediate 11.2 · last 21.2 · MAA 10.8 · BWT 10.0"]
    assert lines[7:] == ["", "not learned yet: GQA, VizWiz, Grounding, VQAv2, OCRVQA"]


def test_terminal_matrix_of_eight_tasks_fits_eighty_columns_without_cutting() -> None:
    text = printed(matrix_table(make_results("cmoe", num_learned=8)))
    assert "…" not in text
    assert all(name in text for name in TASKS)
    assert "77.2" in text and "BWT" in text


def beside(results: Results, matrix: tuple) -> Results:
    route = results.headline.model_copy(update={"other_protocols": {"coin": matrix}})
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
    assert lines[5] == "immediate – · last 10.8 · MAA – · BWT –"
    assert lines[-1] == "no immediate, MAA, BWT: not measured are ScienceQA after ScienceQA"


def test_a_note_names_the_first_missing_cells_and_counts_the_others() -> None:
    results = make_results("zero_shot", num_learned=8)
    matrix = (*[(None,) * 8] * 7, results.headline.matrix[7])
    results = results.model_copy(
        update={"routes": {"located": RouteResults(matrix=matrix, detail={}, metrics=all_metrics(matrix))}}
    )
    [note] = notes(results, "located")
    assert note == (
        "no immediate, MAA, BWT: not measured are ScienceQA after ScienceQA, ScienceQA after TextVQA, "
        "TextVQA after TextVQA and 25 more"
    )


def test_a_note_tells_what_could_not_be_answered_and_every_label_that_not_all_was_asked() -> None:
    subset = Subset(limit=5, seed=2, strata="-", of=dict.fromkeys(TASKS, 10))
    results = make_results("cmoe", num_learned=8).model_copy(
        update={"failed": {"after_03/GQA.located": 2, "after_03/GQA.oracle": 9}, "subset": subset}
    )
    assert notes(results, "located") == ["could not be answered, counted as wrong: 2 of after_03/GQA.located"]
    mark = "subset of 5 (seed 2)"
    assert mark in run_label(results, "located") and mark in metrics_markdown([results])


def with_intervals(results: Results) -> Results:
    measured = results.headline
    cells = tuple(tuple(None if value is None else (0.4, 100.0) for value in row) for row in measured.matrix)
    around = {"last": (20.04, 23.0), "bwt": (-0.04, 1.0), "immediate": (-3.0, 2.0)}
    sure = measured.model_copy(update={"intervals": cells, "metric_intervals": around})
    return results.model_copy(update={"routes": {"located": sure}, "bootstrap": DESCRIPTION})


def test_intervals_stand_beside_every_accuracy_and_fit_eighty_columns() -> None:
    results = with_intervals(make_results("cmoe", num_learned=8))
    text = printed(matrix_table(results))
    assert text.count("0–100") == 36 and "…" not in text and "95%" in text
    lines = matrix_markdown(results).splitlines()
    assert cells(lines[2])[1] == "0.2 (0.4–100.0)"
    assert lines[11] == "immediate 38.8 (-3.0 to 2.0) · last 73.8 (20.0–23.0) · MAA 37.0 · BWT 35.0 (0.0–1.0)"
    assert "73.8 (20.0–23.0)" in metrics_markdown([results])


def test_several_runs_stand_side_by_side_with_locator_accuracy_where_there_is_one() -> None:
    located = make_results("cmoe", located=True)
    runs = [make_results("sequential_lora"), located, located.model_copy(update={"words_alone": {"a": 50, "b": 91}})]
    lines = metrics_markdown(runs).splitlines()
    assert [cells(line)[1:3] + cells(line)[-2:] for line in lines[2:]] == [
        ["sequential_lora", "–", "–", "–"],
        ["cmoe", "located", "90.0", "–"],
        ["cmoe", "located", "90.0", "70.5"],
    ]
    text = printed(metrics_table(runs))
    assert "sequential_lora" in text and "90.0" in text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (-0.04, "0.0"), (-0.06, "-0.1"), (100.0, "100.0")])
def test_numbers_have_one_decimal_and_no_negative_zero(value: float | None, text: str) -> None:
    assert number(value) == text
