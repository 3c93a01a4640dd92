"""GQA as released: the prediction in lower case and without stops at its end is the answer, letter by letter.

The answer is taken as it stands, so one with a capital is never met. A later version of the script also drops one blank
at the beginning of a prediction, which answers files don't hold.
"""

from __future__ import annotations

from llava_cmoe.evaluation.scorers.base import Reference, Score


def prepare(text: str) -> str:
    """The form of a prediction that is compared."""
    return text.rstrip(".").lower()


def score(prediction: str, reference: Reference) -> Score:
    """1 if a run's answer is right, else 0."""
    return Score(float(prepare(prediction) == reference.answer))
