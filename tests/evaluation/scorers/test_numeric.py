"""Numbers within 5 %: how they are written, and where exactly the bound lies."""

from fractions import Fraction

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference
from llava_cmoe.evaluation.scorers.numeric import extract_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", "12"),
        ("12.", "12"),
        ("The answer is 12.5 %", "12.5"),
        ("1,234,567.5 people", "1234567.5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        (".5", "0.5"),
        ("1e3", "1000"),
        ("(7)", "7"),
    ],
)
def test_one_number_is_found_with_what_stands_around_it(text: str, number: str) -> None:
    assert extract_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text", ["", "twelve", "3 of 4", "5-10", "12,34", "1.2.3", "2nd", "H2O", "1e999999999", "1" * 5000]
)
def test_none_several_or_half_a_number_is_none(text: str) -> None:
    assert extract_number(text) is None


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("105", "100", 1.0),
        ("95", "100", 1.0),
        ("105.001", "100", 0.0),
        ("0.315", "0.3", 1.0),  # binary floats say 0.015000000000000013 > 0.015
        ("-100", "100", 0.0),
        ("-102", "-100", 1.0),
        ("0", "0", 1.0),
        ("0.001", "0", 0.0),
        ("", "100", 0.0),
        ("about 99 units", "100", 1.0),
        ("50%", "0.5", 0.0),
        ("Yes.", "yes", 1.0),
        ("12", "yes", 0.0),
    ],
)
def test_a_number_within_the_tolerance_is_right_and_words_are_short_answers(text, truth, expected) -> None:
    assert value("numeric", text, Reference(answer=truth)) == expected
