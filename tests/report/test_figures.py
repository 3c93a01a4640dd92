"""Figures are written as PNG, sized by what they show, the same bytes each time, and refuse what was not measured."""

import struct
from pathlib import Path

import pytest

from llava_cmoe.evaluation.log import LocatorResults, Results, RouteResults
from llava_cmoe.evaluation.metrics import DEFINITIONS, all_metrics
from llava_cmoe.report.figures import (
    draw_confusion,
    draw_forgetting,
    draw_growth,
    draw_matrices,
    site_label,
    site_labels,
)

TASKS = ("ScienceQA", "TextVQA", "ImageNet")


def make_results(num_learned: int = 3, method: str = "cmoe") -> Results:
    matrix = tuple(tuple(90.0 - 30 * (j - i) if i <= j else None for i in range(3)) for j in range(num_learned))
    return Results(
        run="demo", method=method, seed=0, recipe={}, base="b", data="d", tasks=TASKS,
        num_samples=dict.fromkeys(TASKS, 10), protocol="strict", protocol_version=1, definitions=DEFINITIONS,
        routes={"located": RouteResults(matrix=matrix, detail={}, metrics=all_metrics(matrix))},
        locator=LocatorResults(
            columns=(*TASKS, "base"), confusion=((9, 0, 0, 1), (3, 7, 0, 0), (0, 0, 10, 0)),
            accuracy=dict(zip(TASKS, (90.0, 70.0, 100.0), strict=True)), mean_accuracy=260 / 3,
        ),
        sites=("model.layers.0.mlp", "model.layers.1.mlp"),
        growth={"ScienceQA": {"model.layers.0.mlp": 2, "model.layers.1.mlp": 2}, "ImageNet": {"model.layers.1.mlp": 1}},
    )  # fmt: skip


def size_of(png: Path) -> tuple[int, int]:
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_every_run_adds_a_panel(tmp_path: Path) -> None:
    draw_matrices([make_results()], tmp_path / "one.png")
    draw_matrices([make_results(), make_results(method="moelora")], tmp_path / "new" / "two.png")
    (one, _), (two, _) = size_of(tmp_path / "one.png"), size_of(tmp_path / "new" / "two.png")
    assert 1.6 * one < two < 2.4 * one


def test_an_unfinished_run_is_drawn_as_far_as_it_is(tmp_path: Path) -> None:
    draw_matrices([make_results(num_learned=1)], tmp_path / "unfinished.png")
    assert min(size_of(tmp_path / "unfinished.png")) > 100


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    for draw in (draw_confusion, draw_growth):
        draw(make_results(), tmp_path / "a.png")
        draw(make_results(), tmp_path / "b.png")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        assert min(size_of(tmp_path / "a.png")) > 100


def test_an_svg_is_the_same_each_time_and_needs_no_font(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw_confusion(make_results(), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and "<path" in text and "<text" not in text


def test_how_tasks_are_remembered_is_a_panel_per_task_and_a_line_per_run(tmp_path: Path) -> None:
    shorter = make_results(num_learned=1)
    for num, runs in enumerate(([make_results()], [make_results(), shorter])):
        draw_forgetting(runs, tmp_path / f"{num}.png")
        assert min(size_of(tmp_path / f"{num}.png")) > 100
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


def test_a_name_with_dollar_signs_is_a_name(tmp_path: Path) -> None:
    tasks = (r"$\frac$", "a$b", "c")
    draw_forgetting([make_results().model_copy(update={"tasks": tasks})], tmp_path / "dollars.png")
    assert min(size_of(tmp_path / "dollars.png")) > 100


def test_sites_that_would_read_alike_keep_the_end_of_their_names() -> None:
    sites = ["layers.0.self_attn", "layers.0.mlp", "layers.1.mlp"]
    assert site_labels(sites) == ["layer 0 self_attn", "layer 0 mlp", "layer 1"]


def test_a_run_without_verdicts_or_sites_is_refused_by_name(tmp_path: Path) -> None:
    bare = make_results().model_copy(update={"locator": None, "sites": ()})
    with pytest.raises(ValueError, match="run demo has no locator"):
        draw_confusion(bare, tmp_path / "confusion.png")
    with pytest.raises(ValueError, match="run demo has no sites"):
        draw_growth(bare, tmp_path / "growth.png")


@pytest.mark.parametrize(
    ("site", "label"),
    [
        ("model.language_model.layers.12.mlp", "layer 12"),
        ("layers.3.mlp", "layer 3"),
        ("lm_head", "lm_head"),
        ("model.vision_tower.encoder.layers.3.mlp", "vision 3"),
        ("model.multi_modal_projector", "projector"),
    ],
)
def test_sites_are_labelled_by_their_layer(site: str, label: str) -> None:
    assert site_label(site) == label
