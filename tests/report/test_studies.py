"""A study is mean and spread per variant of runs that may stand in one table; document and table agree."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pytest import approx

from llava_cmoe.evaluation.log import LocatorResults, Results, RouteResults
from llava_cmoe.evaluation.metrics import DEFINITIONS, all_metrics
from llava_cmoe.report.figures import draw_study
from llava_cmoe.report.studies import COLUMNS, differences_markdown, read_study, study_markdown, summarise_study

TASKS = ("GQA", "VizWiz", "OCRVQA")
MEASURED = [key for key in COLUMNS if key not in ("words_alone", "seconds")]
STUDY = {"name": "rank", "recipe": "train/recipes/x.yaml", "common": ["data.train_rows=800"], "seeds": [0, 1]}


def result(variant: str, seed: int, last: float, **changes: Any) -> Results:
    """A run that forgets nothing; told the task it is 2 better, under a random route 30 worse."""

    def route(value: float) -> RouteResults:
        matrix = tuple(tuple(value if i <= j else None for i in range(3)) for j in range(3))
        return RouteResults(matrix=matrix, detail={}, metrics=all_metrics(matrix))

    facts: dict[str, Any] = {
        "run": f"{variant}_{seed}", "method": "cmoe", "seed": seed, "recipe": {"seed": seed, "rank": variant},
        "base": "b", "data": "d", "tasks": TASKS, "num_samples": dict.fromkeys(TASKS, 10), "versions": {"torch": "2"},
        "protocol": "strict", "protocol_version": 1, "definitions": DEFINITIONS, "sites": ("low", "high"),
        "routes": {"located": route(last), "oracle": route(last + 2), "random": route(last - 30)},
        "locator": LocatorResults(columns=TASKS, confusion=(), accuracy={}, mean_accuracy=90.0),
        "growth": {"GQA": {"low": 2, "high": 2}, "VizWiz": {"low": 1}, "OCRVQA": {}},
        "trainable_parameters": dict.fromkeys(TASKS, 2000), "stored_bytes": dict.fromkeys(TASKS, 5000),
    }  # fmt: skip
    return Results(**facts | changes)


@pytest.fixture
def runs() -> dict[str, list[Results]]:
    return {"rank_4": [result("rank_4", 1, 62.0), result("rank_4", 0, 60.0)], "rank_8": [result("rank_8", 0, 70.0)]}


def test_numbers_are_mean_and_spread_over_the_seeds_of_a_variant(runs):
    summary = summarise_study(STUDY, runs)
    four, eight = summary.variants.values()
    assert four.seeds == (0, 1) and four.numbers["last"].values == (60.0, 62.0) and eight.seeds == (0,)
    assert four.numbers["last"].std == approx(2**0.5) and eight.numbers["last"].std == 0
    means = {key: spread.mean for key, spread in eight.numbers.items()}
    assert means == approx(
        {
            **{"immediate": 70.0, "last": 70.0, "maa": 70.0, "bwt": 0.0, "located_right": 90.0},
            **{"oracle_minus_located": 2.0, "located_minus_random": 30.0},
            **{"share_grown": 25.0, "trained_thousands": 2.0, "grown_later": 100.0, "stored_kilobytes": 15.0},
            **{f"last on {task}": 70.0 for task in TASKS},
        }
    )


def test_table_and_document_say_the_same(runs, tmp_path: Path):
    summary = summarise_study(STUDY, runs)
    (tmp_path / "study.json").write_text(summary.model_dump_json())
    assert read_study(tmp_path / "study.json") == summary
    *tables, source = study_markdown(summary).split("\n\n")
    for table, keys in zip(tables, (MEASURED, [f"last on {task}" for task in TASKS]), strict=True):
        header, _, *lines = table.splitlines()
        assert header.count("|") == len(keys) + 3
        for line, (name, variant) in zip(lines, summary.variants.items(), strict=True):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[:2] == [name, str(len(variant.seeds))]
            assert [float(cell.split(" ± ")[0]) for cell in cells[2:]] == [
                approx(variant.numbers[key].mean, abs=0.05) for key in keys
            ]
    assert "`train/recipes/x.yaml`, `data.train_rows=800`" in source and "seeds 0, 1" in source


def test_a_column_that_no_variant_measured_is_left_out():
    bare = {"routes": {"located": result("x", 0, 50.0).headline}, "locator": None, "stored_bytes": {}}
    text = study_markdown(summarise_study(STUDY, {"x": [result("x", 0, 50.0, **bare)]}))
    assert "locator" not in text and "stored" not in text and "| x | 1 | 50.0 |" in text


def test_variants_may_differ_in_the_order_of_tasks_and_in_nothing_else_they_share(runs):
    reverse = {"tasks": TASKS[::-1], "num_samples": dict.fromkeys(TASKS[::-1], 10)}
    summarise_study(STUDY, runs | {"reversed": [result("reversed", 0, 50.0, **reverse)]})
    for key, value in (("base", "c"), ("data", "e"), ("versions", {}), ("protocol_version", 2)):
        with pytest.raises(ValueError, match=rf"runs rank_4_1 and other_0 differ in {key}\b"):
            summarise_study(STUDY, runs | {"other": [result("other", 0, 50.0, **{key: value})]})
    with pytest.raises(ValueError, match="mixed: its recipes differ in rank"):
        summarise_study(STUDY, {"mixed": [result("rank_4", 0, 50.0), result("rank_8", 1, 50.0)]})


def test_the_figure_shows_costs_where_variants_differ_in_them(runs, tmp_path: Path):
    dear = result("rank_8", 0, 70.0, trainable_parameters={"GQA": 4000}, stored_bytes={"GQA": 9000})
    differing = runs | {"rank_8": [dear]}
    for name, group in (("one", differing), ("two", differing), ("alike", runs)):
        draw_study(summarise_study(STUDY, group), tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    costly, alike = (Image.open(tmp_path / f"{name}.png").width for name in ("one", "alike"))
    assert costly > 2 * alike


def test_differences_are_paired_by_seed_and_need_a_column_only_where_some_pair_differs(runs):
    dear = {"trainable_parameters": {"GQA": 4000}}
    three = {"rank_16": [result("rank_16", seed, 61.0 + 3 * seed, **dear) for seed in (1, 0, 2)]}
    header, _, *lines = differences_markdown(
        summarise_study(STUDY, runs | three), [("rank_16", "rank_4"), ("rank_8", "rank_4")]
    ).splitlines()
    assert header == "| variant | minus | seeds | last | trained parameters per task (thousands) |"
    assert lines[0] == "| rank_16 | rank_4 | 2 | 1.5 [-4.9 to 7.9] | 2.0 [2.0–2.0] |"  # 61 - 60 and 64 - 62
    assert lines[1] == "| rank_8 | rank_4 | 1 | 10.0 | 0.0 |"


def test_a_document_of_another_format_is_refused_by_name(tmp_path: Path):
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ValueError, match=r"study\.json: not the summary of a study"):
        read_study(tmp_path / "study.json")
