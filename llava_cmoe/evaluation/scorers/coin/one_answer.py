"""VizWiz and VQAv2 as released: the one answer of CoIN's file, in upper case; ten annotators are not asked."""

from __future__ import annotations

from llava_cmoe.evaluation.scorers.base import Reference, Score


def is_right(text: str, truth: str) -> bool:
    """Whether both are the same in upper case; blanks and stops count."""
    return text.upper() == truth.upper()


def score(prediction: str, reference: Reference) -> Score:
    """1 if a run's answer is right, else 0."""
    return Score(float(is_right(prediction, reference.answer)))
