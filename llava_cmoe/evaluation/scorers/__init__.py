"""The table of scorers: a task names one of these, nothing else in the project knows how answers are judged.

Protocol `strict`: what CoIN should have measured. Predictions are joined by id (`runner.score`), an empty answer is
wrong, and every extraction accepts the forms written in its file and nothing else.
"""

from __future__ import annotations

from llava_cmoe.evaluation.scorers import grounding, scienceqa, short_answer, textvqa
from llava_cmoe.evaluation.scorers.base import Reference, Score, Scorer
from llava_cmoe.settings import RecipeError

PROTOCOL = "strict"

PROTOCOL_VERSION = 1
"""Raised whenever any answer would be judged differently; results of two versions are not comparable."""

SCORERS: dict[str, Scorer] = {
    "scienceqa": scienceqa.score,
    "textvqa": textvqa.score,
    "imagenet": short_answer.score,
    "gqa": short_answer.score,
    "vizwiz": short_answer.score,
    "grounding": grounding.score,
    "vqav2": short_answer.score,
    "ocrvqa": short_answer.score,
}

__all__ = ["PROTOCOL", "PROTOCOL_VERSION", "SCORERS", "Reference", "Score", "Scorer", "get_scorer"]


def get_scorer(name: str) -> Scorer:
    """Look a scorer up by the name a task gives it.

    Raises:
        RecipeError: no scorer has this name; tells all names.
    """
    if name not in SCORERS:
        raise RecipeError(f"unknown scorer {name!r}; a task's scorer is one of: {', '.join(SCORERS)}")
    return SCORERS[name]
