"""A number: exactly the true one, or within 5 % of it where the true one was measured.

The tolerance is the relaxed accuracy of PlotQA (Methani et al. 2020) and ChartQA. There it holds for every number, so
that 2005 is right for the year 1999 and 21 for a count of 20; here it holds only for a truth that is written as a
measured quantity: with a decimal point or exponent, a scale, a currency or a unit of measure ("12.5", "3 million",
"$100", "40 km"). A whole number without any of these may be a count or a year, and has to be met exactly.

The answer must hold exactly one number, with any words and units around it. What stands with a number and changes it is
read: a sign ("-5", a typographic minus, "minus 5", "negative 5"), a scale ("3 million", "3M", "50 %", "50 percent",
which are hundredths: 50 % is 0.5, as in ChartQA's script), and commas between thousands. A reference that is no number
is compared as a short answer. Numbers are the decimals that were written, so an answer at exactly 5 % is right whatever
binary rounding would say. A true 0 has to be met exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from llava_cmoe.data.spelling import respell
from llava_cmoe.evaluation.scorers import short_answer
from llava_cmoe.evaluation.scorers.base import LONGEST, Reference, Score

TOLERANCE = Fraction(5, 100)

SCALES: dict[str, int | Fraction] = {
    **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12},
    **{"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9},
    **{"%": Fraction(1, 100), "‰": Fraction(1, 1000)},
}
"""What a number is multiplied by. Abbreviations count right behind the digits only: the M of "5 M" may be anything."""

UNITS = (
    "mm cm dm m km ft feet foot inch inches yard yards mile miles meter meters metre metres kilometers kilometres "
    "mg g kg t lb lbs oz gram grams kilogram kilograms ton tons tonne tonnes pound pounds ounce ounces ml cl l L liter "
    "liters litre litres ms s sec second seconds min minute minutes h hr hrs hour hours mph kph W kW MW GW kWh V Hz "
    "kHz MHz GHz degree degrees dollar dollars euro euros USD EUR GBP"
).split()
"""Units of measure. What is counted (people, cars, years) is none, nor is "in", which is a preposition more often."""

NUMBER = re.compile(
    r"(?<![\w.,+-])"  # not the tail of a word, a range or another number
    r"(?P<digits>[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d\d?)?)"
    r"(?:(?P<scale>(?:[\s-]?(?i:hundred|thousand|million|billion|trillion)s?\b)+"
    r"|\s*(?:%|‰|(?i:per\s?cent)(?:age\spoints?)?\b)"
    r"|(?:k|K|M|mn|B|bn)\b)"
    rf"|(?=(?:{'|'.join(UNITS)})\b)"
    r"|(?![\w-]|[.,]\d))"  # nor the head of one
    rf"(?P<unit>\s*(?:(?:{'|'.join(UNITS)})\b|°))?",
    re.ASCII,
)

CURRENCY = re.compile(r"(?<![A-Za-z])[A-Z]{0,2}[$€£¥]\s*", re.ASCII)  # $, US$
SIGN_WORD = re.compile(r"\b(?:(minus|negative)|plus|positive)\s+(?=[-+.\d])", re.ASCII | re.IGNORECASE)
MINUS_APART = re.compile(r"−\s+|(?<![^:=(])\s*-\s+(?=[.\d])")
"""A minus with a blank behind it: any typographic one, and a hyphen where it opens the text or follows one of `:=(`."""


@dataclass(frozen=True)
class Number:
    """A number as a text gives it, and whether it is written as a measured quantity."""

    value: Fraction
    measured: bool


def score(prediction: str, reference: Reference) -> Score:
    """1 if the prediction's one number is the true one, or within the tolerance of a measured one; else 0."""
    truth = extract_number(reference.answer)
    if truth is None:
        return short_answer.score(prediction, reference)
    given = extract_number(prediction)
    allowed = TOLERANCE * abs(truth.value) if truth.measured else Fraction(0)
    return Score(float(given is not None and abs(given.value - truth.value) <= allowed))


def extract_number(text: str) -> Number | None:
    """The one number in a text; None if there is none, or several, or if it has no end."""
    plain = MINUS_APART.sub("-", text)
    plain = CURRENCY.sub("", respell(plain))
    plain = MINUS_APART.sub("-", plain)
    plain = SIGN_WORD.sub(lambda word: "-" if word[1] else "+", plain)
    found = list(NUMBER.finditer(plain))
    if len(found) != 1 or len(found[0]["digits"]) > LONGEST:
        return None
    digits, scale, unit = found[0].group("digits", "scale", "unit")
    decimal = any(sign in digits for sign in ".eE")
    value = Fraction(digits.replace(",", "")) * _factor(scale or "")
    return Number(value, bool(decimal or scale or unit or CURRENCY.search(respell(text))))


def _factor(scale: str) -> Fraction:
    """What a scale multiplies by, the product of its words: "hundred thousand" is 100,000."""
    abbreviation = scale.strip()
    if abbreviation in SCALES:
        return Fraction(SCALES[abbreviation])
    if abbreviation.lower().startswith("per"):
        return Fraction(SCALES["%"])
    words = re.findall("[a-z]+", scale.lower())
    return prod((Fraction(SCALES[word.removesuffix("s")]) for word in words), start=Fraction(1))
