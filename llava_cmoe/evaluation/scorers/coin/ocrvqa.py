"""OCRVQA as released: the same in lower case, but nothing that holds "Unanswerable" is right, not even as a title."""

from __future__ import annotations

from llava_cmoe.evaluation.scorers.base import Reference, Score


def is_right(text: str, truth: str) -> bool:
    """Whether both are the same in lower case, and the text does not hold the word (with its capital)."""
    return "Unanswerable" not in text and text.lower() == truth.lower()


def score(prediction: str, reference: Reference) -> Score:
    """1 if a run's answer is right, else 0."""
    return Score(float(is_right(prediction, reference.answer)))
