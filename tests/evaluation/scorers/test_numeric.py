"""Numbers: how they are written, which must be met exactly, and where the 5 % of measured ones end."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judging import value

from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.evaluation.scorers import Reference
from llava_cmoe.evaluation.scorers.numeric import extract_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", "12"),
        ("12.", "12"),
        ("The answer is 12.5 kg", "12.5"),
        ("1,234,567.5 people", "1234567.5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        (".5", "0.5"),
        ("1e3", "1000"),
        ("(7)", "7"),
        ("\u22125", "-5"),
        ("\u2212 5", "-5"),
        ("- 5", "-5"),
        ("answer: - 5", "-5"),
        ("the total - 5", "5"),
        ("\uff0d\uff15", "-5"),
        ("minus 5", "-5"),
        ("Negative $5", "-5"),
        ("plus 5", "5"),
        ("3 million", "3000000"),
        ("3-million-dollar", "3000000"),
        ("minus 1.5 thousand", "-1500"),
        ("5 hundred thousand", "500000"),
        ("2.5M", "2500000"),
        ("2.5 m", "2.5"),
        ("$3bn", "3000000000"),
        ("50%", "0.5"),
        ("50 percent", "0.5"),
        ("50 per cent", "0.5"),
        ("\uff15\uff10\uff05", "0.5"),
        ("US$5", "5"),
        ("5 \u20ac", "5"),
        ("12km", "12"),
    ],
)
def test_one_number_is_found_with_what_stands_around_it(text: str, number: str) -> None:
    found = extract_number(text)
    assert found is not None and found.value == Fraction(number)


@pytest.mark.parametrize(
    "text",
    (
        *("", "twelve", "3 of 4", "5-10", "5\u201310", "5 - 3", "12,34", "1.2.3", "2nd", "H2O", "minus -5"),
        *("1e999999999", "1" * 5000),
    ),
)
def test_none_several_or_half_a_number_is_none(text: str) -> None:
    assert extract_number(text) is None


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("105", "100.0", 1.0),
        ("95", "100 km", 1.0),
        ("105.001", "100 km", 0.0),
        ("105", "100", 0.0),  # may be a count
        ("2005", "1999", 0.0),
        ("1,999", "1999", 1.0),
        ("21", "20", 0.0),
        ("20", "20 people", 1.0),
        ("21", "20 people", 0.0),
        ("21", "20 kg", 1.0),
        ("3.1 million", "3 million", 1.0),
        ("3", "3 million", 0.0),
        ("3 million", "3", 0.0),
        ("51%", "50%", 1.0),
        ("0.315", "0.3", 1.0),  # binary floats say 0.015000000000000013 > 0.015
        ("-100", "100", 0.0),
        ("minus 100", "100.0", 0.0),
        ("-102", "-100.0", 1.0),
        ("minus 102", "\u2212100.0", 1.0),
        ("0", "0", 1.0),
        ("0.001", "0", 0.0),
        ("", "100", 0.0),
        ("about 100 units", "100", 1.0),
        ("50%", "0.5", 1.0),
        ("50%", "50", 0.0),
        ("Yes.", "yes", 1.0),
        ("12", "yes", 0.0),
    ],
)
def test_a_number_within_the_tolerance_is_right_and_words_are_short_answers(text, truth, expected) -> None:
    assert value("numeric", text, Reference(answer=truth)) == expected


whole = st.integers(1, 10**7)


@given(whole, st.integers(-(10**6), 10**6), st.sampled_from(["{}", "{} cars", "in {}", "year {}", "{:,}", "{}."]))
def test_a_count_or_year_is_met_exactly_or_not(truth: int, off: int, form: str) -> None:
    reference = Reference(answer=form.format(truth))
    assert value("numeric", str(truth + off), reference) == float(off == 0)


@given(st.integers(1, 10**5), st.integers(-10, 10), st.sampled_from(["{}.0", "{} km", "${}", "{} thousand", "{}e0"]))
def test_a_measured_quantity_is_met_within_the_tolerance(truth: int, percent: int, form: str) -> None:
    given_number = Fraction(truth * (100 + percent), 100)
    text = f"{float(given_number):.6f}"
    text = f"{text} thousand" if "thousand" in form else text
    assert value("numeric", text, Reference(answer=form.format(truth))) == float(abs(percent) <= 5)


SIGNED = (
    *("-{}", "\u2212{}", "\u2212 {}", "\uff0d{}", "\ufe63{}", "-${}", "$-{}"),
    *("minus {}", "Minus {}", "negative {}", "minus ${}"),
)


@given(st.decimals("0.1", 10**6, places=1), st.sampled_from(SIGNED), st.sampled_from(["", "It is ", "\n"]))
def test_every_sign_below_zero_is_read(number: object, form: str, before: str) -> None:
    text = before + form.format(number)
    assert value("numeric", text, Reference(answer=f"-{number}")) == 1.0
    assert value("numeric", text, Reference(answer=str(number))) == 0.0


SCALED = {
    **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "Million": 10**6, "billion": 10**9, "trillion": 10**12},
    **{"%": Fraction(1, 100), "percent": Fraction(1, 100), "per cent": Fraction(1, 100), "millions": 10**6},
}


@given(st.decimals("0.1", 10**4, places=1), st.sampled_from(sorted(SCALED)), st.sampled_from(["{} {}", "{} {} people"]))
def test_every_scale_multiplies_on_both_sides(number: object, scale: str, form: str) -> None:
    written, value_of_it = form.format(number, scale), Fraction(str(number)) * SCALED[scale]
    plain = f"{float(value_of_it):.6f}"
    for text, truth in ((written, plain), (plain, written), (written, written)):
        assert value("numeric", text, Reference(answer=truth)) == 1.0
    assert value("numeric", str(number), Reference(answer=written)) == 0.0
    assert value("numeric", written, Reference(answer=str(number))) == 0.0


@given(st.integers(0, 10), st.integers(0, 10))
def test_the_counts_of_ucit_are_met_exactly_as_its_publisher_compares_texts(truth: int, given_count: int) -> None:
    (counting,) = (task for task in load_sequence("ucit").tasks if task.name == "clevr_math")
    assert value(counting.scorer, str(given_count), Reference(answer=str(truth))) == float(given_count == truth)
    assert value(counting.scorer, f"{truth}.", Reference(answer=str(truth))) == 1.0
    assert any("no tolerance" in note for note in counting.notes)
