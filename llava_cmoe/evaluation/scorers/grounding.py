"""Grounding: does the box in the answer overlap the true one by at least half? Also reports the overlap itself (IoU).

How many answers reach other bounds than one half is reported, too. Both boxes are normalised on the padded square.
Coordinates are taken as the decimal numbers that were written and computed with as fractions, so an overlap of exactly
one half counts whatever binary rounding would say.
"""

from __future__ import annotations

import re
from fractions import Fraction

from llava_cmoe.data.demands import four_numbers
from llava_cmoe.data.spelling import respell
from llava_cmoe.evaluation.scorers.base import LONGEST, Reference, Score

NUMBER = re.compile(
    r"(?<![\w.+-])"  # not the tail of another number or word
    r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d\d?)?"
    r"(?!\w|\.\w)",  # nor the head of one: "0.3_7" and "1.2.3" are no numbers
    re.ASCII,
)

BOUNDS = {f"at_{bound}": Fraction(bound) for bound in ("0.3", "0.5", "0.7", "0.9")}
"""Overlaps whose share of answers is reported; 0.5 decides."""

Box = tuple[Fraction, Fraction, Fraction, Fraction]


def score(prediction: str, reference: Reference) -> Score:
    """1 if IoU >= 0.5, else 0; in `detail` the overlap, 0 where the answer holds no box, and which bounds it reaches.

    Raises:
        ValueError: the row's own box is not four numbers.
    """
    four_numbers(reference)
    x1, y1, x2, y2 = (Fraction(str(value)) for value in reference.box)
    found = extract_box(prediction)
    overlap = iou(found, (x1, y1, x2, y2)) if found else Fraction(0)
    reached = {name: float(overlap >= bound) for name, bound in BOUNDS.items()}
    return Score(reached["at_0.5"], {"iou": float(overlap), **reached})


def extract_box(text: str) -> Box | None:
    """The box that the text gives: exactly four numbers, with any words and brackets around them; else None.

    Full-width digits and a typographic minus are read as what they look like.
    """
    numbers = NUMBER.findall(respell(text))
    if len(numbers) != 4 or max(map(len, numbers)) > LONGEST:
        return None
    x1, y1, x2, y2 = map(Fraction, numbers)
    return x1, y1, x2, y2


def iou(first: Box, second: Box) -> Fraction:
    """Intersection over union with plain areas; 0 where a box is inside out or both are empty."""
    width = max(Fraction(0), min(first[2], second[2]) - max(first[0], second[0]))
    height = max(Fraction(0), min(first[3], second[3]) - max(first[1], second[1]))
    union = _area(first) + _area(second) - width * height
    return width * height / union if union else Fraction(0)


def _area(box: Box) -> Fraction:
    return max(Fraction(0), box[2] - box[0]) * max(Fraction(0), box[3] - box[1])
