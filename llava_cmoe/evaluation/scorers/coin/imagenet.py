"""ImageNet as released: right if the class's name lies in the prediction, or the prediction in the name.

Case counts. An empty prediction lies in every name, so it is right, and so is "a" for most of them.
"""

from __future__ import annotations

from llava_cmoe.evaluation.scorers.base import Reference, Score


def is_right(text: str, truth: str) -> bool:
    """Whether one holds the other."""
    return truth in text or text in truth


def score(prediction: str, reference: Reference) -> Score:
    """1 if a run's answer is right, else 0."""
    return Score(float(is_right(prediction, reference.answer)))
