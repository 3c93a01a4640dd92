"""The headline is mean and spread over seeds of runs that may stand in one table."""

import re
from typing import Any

import pytest
from pytest import approx

from llava_cmoe.evaluation.log import LocatorResults, Results, RouteResults
from llava_cmoe.evaluation.metrics import DEFINITIONS, all_metrics
from llava_cmoe.report.headline import (
    Headline,
    against_control_markdown,
    headline_markdown,
    joined,
    readme_markdown,
    summarise,
    tasks_markdown,
)
from llava_cmoe.report.summary import Spread

TASKS = ("GQA", "VizWiz", "OCRVQA")
LAYERS = ("low", "high")


def result(method: str, seed: int, low: float = 0.0, high: float = 80.0, **changes: Any) -> Results:
    """A task is answered at `high` percent right after learning it and loses `low` with each task that follows."""
    matrix = tuple(tuple(high - low * (j - i) if i <= j else None for i in range(3)) for j in range(3))
    located = RouteResults(matrix=matrix, detail={}, metrics=all_metrics(matrix))
    facts: dict[str, Any] = {
        "run": f"{method}_{seed}", "method": method, "seed": seed, "recipe": {"seed": seed, "training": {"epochs": 4}},
        "base": "b", "data": "d", "tasks": TASKS, "num_samples": dict.fromkeys(TASKS, 10), "versions": {"torch": "2"},
        "protocol": "strict", "protocol_version": 1, "definitions": DEFINITIONS, "locator": None,
        "routes": {"located": located}, "growth": {task: {} for task in TASKS}, "sites": (),
        "trainable_parameters": dict.fromkeys(TASKS, 2000),
    }  # fmt: skip
    return Results(**facts | changes)


def cmoe(seed: int, oracle: float, right: float, grown: dict[str, int], **changes: Any) -> Results:
    """A run that loses nothing, whose last task grew in the layers `grown` and whose oracle route ends at `oracle`."""
    matrix = tuple(tuple(oracle if i <= j else None for i in range(3)) for j in range(3))
    base = result("cmoe", seed)
    return result("cmoe", seed, **{
        "routes": base.routes | {"oracle": RouteResults(matrix=matrix, detail={}, metrics=all_metrics(matrix))},
        "locator": LocatorResults(columns=TASKS, confusion=(), accuracy={}, mean_accuracy=right), "sites": LAYERS,
        "growth": {"GQA": {"low": 2}, "VizWiz": {"low": 1, "high": 1}, "OCRVQA": grown},
        "trainable_parameters": {"GQA": 3000, "VizWiz": 2000, "OCRVQA": 1000 * seed},
    } | changes)  # fmt: skip


def shown(spread: Spread) -> tuple[float, ...]:
    return (spread.mean, spread.std, *spread.values)


def test_numbers_are_mean_and_spread_over_the_seeds_in_their_order():
    forgets = [result("sequential_lora", 2, low=20.0), result("sequential_lora", 1, low=10.0, high=60.0)]
    keeps = [cmoe(1, oracle=81.0, right=90.0, grown={}), cmoe(4, oracle=83.0, right=96.0, grown={"low": 1, "high": 1})]
    summary = summarise([*forgets, *keeps])
    assert [(name, one.seeds) for name, one in summary.rows.items()] == [("sequential_lora", (1, 2)), ("cmoe", (1, 4))]
    lora, cmoes = (one.numbers for one in summary.rows.values())
    root_two = 2**0.5
    assert shown(lora["immediate"]) == approx((70.0, 20 / root_two, 60.0, 80.0))
    assert shown(lora["last"]) == approx((55.0, 10 / root_two, 50.0, 60.0))  # (40 + 50 + 60) / 3, (40 + 60 + 80) / 3
    assert shown(lora["bwt"]) == approx((-15.0, 10 / root_two, -10.0, -20.0))  # -(20 + 10 + 0) / 3, -(40 + 20 + 0) / 3
    assert shown(lora["maa"]) == approx((62.5, 15 / root_two, 55.0, 70.0))  # (60 + 55 + 50) / 3, (80 + 70 + 60) / 3
    assert lora.keys() == {"immediate", "last", "bwt", "maa", "forgetting", "trained_thousands", "grown_later"}
    assert shown(cmoes["located_right"]) == approx((93.0, 6 / root_two, 90.0, 96.0))
    assert shown(cmoes["oracle_minus_located"]) == approx((2.0, 2 / root_two, 1.0, 3.0))
    assert shown(cmoes["trained_thousands"]) == approx((2.5, 1 / root_two, 2.0, 3.0))
    assert Headline.model_validate_json(summary.model_dump_json()) == summary


def test_the_table_has_a_line_per_method_and_a_dash_for_what_was_not_measured():
    runs = [result("zero_shot", 0, high=5.0), *(result("sequential_lora", seed, high=60.0 + seed) for seed in (0, 2))]
    header, _, *lines = headline_markdown(summarise(runs)).splitlines()
    assert header.startswith("| method | seeds | immediate | last | last by `coin` | MAA | BWT | forgetting |")
    assert lines[0].startswith("| zero_shot | 1 | 5.0 | 5.0 | – | 5.0 | 0.0 | 0.0 | – |")  # one seed has no spread
    assert lines[1].startswith("| sequential_lora | 2 | 61.0 ± 1.4 |") and len(lines) == 2


def test_a_number_that_one_run_lacks_is_not_a_mean_over_the_others():
    whole = cmoe(1, oracle=81.0, right=90.0, grown={})
    lacking = whole.model_copy(update={"seed": 2, "routes": {"located": whole.headline}})
    assert "oracle_minus_located" not in summarise([whole, lacking]).rows["cmoe"].numbers


def test_another_protocols_mean_is_over_all_tasks_or_absent():
    def judged(*last: float | None) -> dict[str, Spread]:
        run = result("joint", 0)
        others = {"coin": ((5.0, None, None), (5.0, 5.0, None), last)}
        routes = {"located": run.headline.model_copy(update={"other_protocols": others})}
        return summarise([run.model_copy(update={"routes": routes})]).rows["joint"].numbers

    assert judged(10.0, 20.0, 60.0)["last_coin"].mean == approx(30.0)
    assert "last_coin" not in judged(10.0, None, 60.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base", "other"),
        ("data", "other"),
        ("tasks", TASKS[::-1]),
        ("num_samples", dict.fromkeys(TASKS, 11)),
        ("protocol_version", 2),
        ("versions", {"torch": "3"}),
    ],
)
def test_runs_that_differ_in_what_all_must_share_are_refused_by_its_name(key: str, value: Any):
    runs = [result("zero_shot", 0), result("joint", 0), result("joint", 1, **{key: value})]
    with pytest.raises(ValueError, match=rf"runs zero_shot_0 and joint_1 differ in {key}\b") as refused:
        summarise(runs)
    assert key != "versions" or "versions.torch (was '2', now '3')" in str(refused.value)


def test_recipes_of_one_method_differ_only_in_the_seed():
    longer = result("joint", 1, recipe={"seed": 1, "training": {"epochs": 5}})
    with pytest.raises(ValueError, match=re.escape("joint: its recipes differ in training.epochs (was 4, now 5)")):
        summarise([result("joint", 0), longer])
    with pytest.raises(ValueError, match="joint: a seed occurs twice"):
        summarise([result("joint", 0), result("joint", 0)])
    summarise([result("zero_shot", 0), longer])


def test_a_run_that_is_not_finished_is_refused():
    whole = result("joint", 0)
    rows = whole.headline.matrix[:2]
    half = whole.model_copy(update={"routes": {"located": whole.headline.model_copy(update={"matrix": rows})}})
    with pytest.raises(ValueError, match="joint_0: 2 of 3 tasks are learned"):
        summarise([half])


def test_the_readme_table_states_seeds_protocol_and_fewer_columns():
    runs = [result("zero_shot", 0, high=5.0), *(result("joint", seed, high=60.0 + seed) for seed in (0, 2))]
    table, note = readme_markdown(summarise(runs)).split("\n\n")
    header, _, zero_shot, joint = table.splitlines()
    assert header.count("|") == 9 and "MAA" not in header
    assert zero_shot.startswith("| zero_shot | 1 | 5.0 | 5.0 |") and joint.startswith("| joint | 2 | 61.0 ± 1.4 |")
    assert "3 tasks" in note and "`strict`" in note and note.endswith("seeds 0, 2.*")


def test_rows_measured_later_join_those_before_unless_they_cannot_stand_in_one_table():
    before = summarise([result("joint", seed, high=50.0) for seed in (0, 1)] + [result("lwf", 0)])
    now = summarise([result("ewc", 0), result("joint", 2, high=70.0)])
    both = joined(before, now)
    assert list(both.rows) == ["joint", "lwf", "ewc"]
    assert (both.rows["joint"].seeds, both.rows["lwf"]) == ((2,), before.rows["lwf"])
    with pytest.raises(ValueError, match=r"rows measured before differ in data \(was 'd', now 'other'\)"):
        joined(before, summarise([result("ewc", 0, data="other")]))


def test_every_row_is_compared_with_the_control_seed_by_seed():
    values = {"lora_per_task": (60.0, 61.0, 65.0), "cmoe": (62.0, 65.0, 67.0), "joint": (70.0, 71.0, 75.0)}
    runs = [result(name, seed, high=high) for name, highs in values.items() for seed, high in enumerate(highs)]
    header, _, *lines = (against_control_markdown(summarise(runs)) or "").splitlines()
    assert header == "| minus lora_per_task | immediate | last | MAA | BWT |"
    # 2, 4, 2: mean 2.667, standard deviation 1.155, t of two degrees of freedom 4.303
    assert lines[0].startswith("| cmoe | 2.7 [-0.2 to 5.5] | 2.7 [-0.2 to 5.5] |")
    assert lines[1] == "| joint | 10.0 [10.0–10.0] | 10.0 [10.0–10.0] | 10.0 [10.0–10.0] | 0.0 [0.0–0.0] |"
    assert against_control_markdown(summarise(runs[3:])) is None


def test_tasks_after_the_last_one_are_means_over_seeds_or_a_dash():
    def seeded(seed: int, *last: float | None) -> Results:
        run = result("joint", seed)
        matrix = ((50.0, None, None), (50.0, 50.0, None), last)
        return run.model_copy(update={"routes": {"located": run.headline.model_copy(update={"matrix": matrix})}})

    table = tasks_markdown(summarise([seeded(0, 10.0, 20.0, None), seeded(1, 12.0, 20.0, 5.0)]))
    assert table.splitlines()[0] == "| method | seeds | GQA | VizWiz | OCRVQA |"
    assert table.splitlines()[-1] == "| joint | 2 | 11.0 ± 1.4 | 20.0 ± 0.0 | – |"
