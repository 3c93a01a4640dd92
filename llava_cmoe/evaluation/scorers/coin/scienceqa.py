"""ScienceQA as released: the first letter that a prediction can be made to give.

"It's B." gives S and "Don't know" T, each standing alone behind its apostrophe; digits count, and any
letter of Unicode.
"""

from __future__ import annotations

import re

from llava_cmoe.evaluation.scorers.base import Reference, Score

OPTIONS = ("A", "B", "C", "D", "E")
LONE = re.compile(r"\b(\w)\b")


def letter(text: str, num_choices: int) -> str | None:
    """The option that the text is read as; None if it is none of the choices."""
    if text in OPTIONS or (len(text) >= 3 and text[0] in OPTIONS and text[1:3] == ". "):
        given = text[0]
    else:
        found = LONE.search(text)
        given = found[1].upper() if found else ""
    return given if given in OPTIONS[:num_choices] else None


def score(prediction: str, reference: Reference) -> Score:
    """1 if a run's answer is read as the right letter, else 0; a sixth option can't be read, hence never be right."""
    return Score(float(letter(prediction, len(reference.choices)) == reference.answer))
