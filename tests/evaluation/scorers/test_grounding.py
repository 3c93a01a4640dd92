"""Grounding: boxes found by pattern, overlaps decided exactly; cases the released script misreads."""

from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_cmoe.evaluation.scorers import Reference
from llava_cmoe.evaluation.scorers.grounding import extract_box, iou, score

# A busy machine is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

BOX = (0.1, 0.2, 0.5, 0.9)

coordinates = st.integers(0, 20).map(lambda value: Fraction(value, 20))
boxes = st.tuples(coordinates, coordinates, coordinates, coordinates)


@pytest.mark.parametrize(
    "text",
    [
        "[0.1, 0.2, 0.5, 0.9]",
        "0.1, 0.2, 0.5, 0.9",
        "[.1,.2,.5,.9].",
        "[[0.10, 0.20, 0.50, 0.90]]",
        "The region is (0.1 0.2 0.5 0.9).",
        "[1e-1, 0.2, 0.5, 0.9]",
        "\uff3b\uff10.1\uff0c 0.2\uff0c 0.5, 0.\uff19\uff3d",
        "[\u200b0.1,\u00a00.2, 0.5, 0.9]",
    ],
)
def test_four_numbers_are_found_whatever_stands_around_them(text: str) -> None:
    assert extract_box(text) == tuple(Fraction(str(value)) for value in BOX)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[0.1, 0.2, 0.5]",
        "[0.1, 0.2, 0.5, 0.9, 1.0]",
        "box 1: [0.1, 0.2, 0.5, 0.9]",
        "[nan, 0.2, 0.5, 0.9]",
        "[0.1, 0.2, 0.5, 0.9_7]",
        "[0.1, 0.2, 0.5, 1e999999999]",
        "[0.1.2, 0.2, 0.5, 0.9]",
        f"[0.1, 0.2, 0.5, 0.{'9' * 5000}]",
        "the left one",
    ],
)
def test_anything_but_exactly_four_numbers_is_no_box_and_wrong(text: str) -> None:
    assert extract_box(text) is None
    assert score(text, Reference(box=BOX)).value == 0.0
    assert set(score(text, Reference(box=BOX)).detail.values()) == {0.0}


def test_the_last_coordinate_and_the_sign_are_read_in_full() -> None:
    """The released script cuts the last character ("0.9" -> 0.0, "…, 1]" unreadable) and loses a leading minus."""
    assert score("0.1, 0.2, 0.5, 0.9", Reference(box=BOX)).detail["iou"] == 1.0
    assert score("[0, 0, 1, 1]", Reference(box=(0, 0, 1, 1))).value == 1.0
    assert extract_box("-0.1, 0.2, 0.5, 0.9") == (Fraction(-1, 10), Fraction(1, 5), Fraction(1, 2), Fraction(9, 10))


@pytest.mark.parametrize("step", range(1, 41))
def test_an_overlap_of_exactly_one_half_is_right_at_every_size(step: int) -> None:
    side = step / 50
    reference = Reference(box=(0.1, 0.1, round(0.1 + side, 2), 0.3))
    result = score(f"[0.1, 0.1, {0.1 + side:.2f}, 0.2]", reference)
    assert (result.value, result.detail["iou"]) == (1.0, 0.5)


def test_further_bounds_are_reported_and_one_half_decides() -> None:
    result = score("[0, 0, 1, 0.7]", Reference(box=(0, 0, 1, 1)))
    assert (result.value, result.detail) == (
        1.0, {"iou": 0.7, "at_0.3": 1.0, "at_0.5": 1.0, "at_0.7": 1.0, "at_0.9": 0.0},
    )  # fmt: skip


def test_just_below_one_half_is_wrong() -> None:
    assert score("[0, 0, 1, 0.4999]", Reference(box=(0, 0, 1, 1))).value == 0.0


def test_an_inside_out_box_overlaps_nothing() -> None:
    assert score("[0.5, 0.9, 0.1, 0.2]", Reference(box=BOX)).detail["iou"] == 0.0


@UNHURRIED
@given(boxes, boxes)
def test_overlap_is_symmetric_and_within_zero_and_one(first: tuple, second: tuple) -> None:
    assert 0 <= iou(first, second) <= 1
    assert iou(first, second) == iou(second, first)


@UNHURRIED
@given(boxes)
def test_a_box_with_an_area_overlaps_itself_fully(box: tuple) -> None:
    has_area = box[0] < box[2] and box[1] < box[3]
    assert iou(box, box) == int(has_area)


@pytest.mark.parametrize("box", [(), (0.1, 0.2, 0.5)])
def test_a_row_without_a_true_box_is_an_error(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="answer_bbox"):
        score("[0.1, 0.2, 0.5, 0.9]", Reference(box=box))
