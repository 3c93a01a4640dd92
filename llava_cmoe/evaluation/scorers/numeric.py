"""A number, right within 5 % of the true one: the relaxed accuracy of PlotQA (Methani et al. 2020) and ChartQA.

The answer must hold exactly one number, with any words and units around it; "1,234" is one, and a percent sign a unit.
A reference that is no number is compared as a short answer. Numbers are the decimals that were written, so an answer at
exactly 5 % is right whatever binary rounding would say. A true 0 has to be met exactly.
"""

from __future__ import annotations

import re
from fractions import Fraction

from llava_cmoe.evaluation.scorers import short_answer
from llava_cmoe.evaluation.scorers.base import LONGEST, Reference, Score

TOLERANCE = Fraction(5, 100)

NUMBER = re.compile(
    r"(?<![\w.,+-])"  # not the tail of a word, a range or another number
    r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d\d?)?"
    r"(?![\w-]|[.,]\d)",  # nor the head of one
    re.ASCII,
)
CURRENCY = str.maketrans("", "", "$€£¥")  # "-$5" is a number below zero


def score(prediction: str, reference: Reference) -> Score:
    """1 if the prediction's one number lies within the tolerance, else 0."""
    truth = extract_number(reference.answer)
    if truth is None:
        return short_answer.score(prediction, reference)
    given = extract_number(prediction)
    return Score(float(given is not None and abs(given - truth) <= TOLERANCE * abs(truth)))


def extract_number(text: str) -> Fraction | None:
    """The one number in a text; None if there is none, or several, or if it has no end."""
    found = NUMBER.findall(text.translate(CURRENCY))
    return Fraction(found[0].replace(",", "")) if len(found) == 1 and len(found[0]) <= LONGEST else None
