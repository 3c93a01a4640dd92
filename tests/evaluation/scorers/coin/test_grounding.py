"""Grounding as released: what cutting two characters and Python's floats do to boxes, and where one half falls."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference
from llava_cmoe.evaluation.scorers.coin.grounding import is_right

UNIT = "[0, 0, 1, 1]"


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("[0.0, 0.0, 1.0, 1.0]", UNIT, True),  # ".0, 0.0, 1.0, 1."
        ("[0, 0, 1, 1]", UNIT, False),  # ", 0, 1, "
        ("[0.1, 0.1, 0.9, 0.9]", "[0.1, 0.1, 0.9, 0.9]", False),  # the last number is 0.0
        ("[0.1, 0.1, 0.9, 0.9] ", "[0.1, 0.1, 0.9, 0.9]", True),  # the blank takes the cut
        ("[0.1, 0.1, 0.9, 0.9].", "[0.1, 0.1, 0.9, 0.9]", True),
        ("[0.1, 0.1, 0.9, 0.9],", "[0.1, 0.1, 0.9, 0.9]", True),
        ("-0.1, 0.1, 0.9, 0.95", "[0.1, 0.1, 0.9, 0.9]", True),  # and the minus at the beginning
        ("[[00.1, 0.1], [0.9, 0.95]]", "[0.1, 0.1, 0.9, 0.9]", True),
        (" 0.1, 0.1, 0.9, 0.9 ", "[0.1, 0.1, 0.9, 0.9]", True),
        ("00.1, 0.1, 0.9_0, 9e-11", "[0.1, 0.1, 0.9, 0.9]", True),
        ("00, 0, 1, inf ", UNIT, False),
        ("00, 0, 1, infinity ", "[0, 0, 1, inf]", False),  # inf / inf
        ("00, 0, nan, 1 ", UNIT, False),
        ("00, nan, 1, 1 ", UNIT, False),
        ("00, 0, 1, 1, 1 ", UNIT, False),
        ("00, 0, 1 ", UNIT, False),
        ("(0, 0, 1, 1)", UNIT, True),  # round brackets are what the cut was meant for
        ("the box (0, 0, 1, 1)", UNIT, False),
        ("", UNIT, False),
        (None, UNIT, False),
        (["0, 0, 1, 1"], UNIT, False),
    ],
)
def test_a_prediction_is_read_as_the_script_reads_it(text: object, truth: str, expected: bool) -> None:
    assert is_right(text, truth, [640, 480]) is expected


def test_exactly_one_half_is_wrong_unless_rounding_says_more() -> None:
    """The same overlap at 100 widths of the box: which of them count depends on the picture's size."""

    def counted(side: int) -> list[bool]:
        boxes = [(f"(0.1, 0.1, {0.1 + step / 125:.3f}, 0.2)", step) for step in range(1, 100)]
        return [is_right(text, f"[0.1, 0.1, {0.1 + step / 125:.3f}, 0.3]", [side, 1]) for text, step in boxes]

    assert set(counted(640)) == {False, True}
    assert counted(640) != counted(500)


def test_just_above_one_half_is_right() -> None:
    assert is_right("(0, 0, 1, 0.50001)", UNIT, [640, 480])
    assert not is_right("(0, 0, 1, 0.5)", UNIT, [640, 480])


@pytest.mark.parametrize(
    ("truth", "size"), [("[0, 0, 1]", [1, 1]), ("[0, 0, 1, x]", [1]), (UNIT, []), (UNIT, ["640"]), (UNIT, [10**400])]
)
def test_a_truth_or_size_at_which_the_script_stops_is_an_error(truth: str, size: list) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        is_right("(0, 0, 1, 1)", truth, size)


def test_a_runs_row_may_not_tell_its_size() -> None:
    assert value("grounding", "(0, 0, 1, 1)", Reference(answer=UNIT), "coin") == 1.0
