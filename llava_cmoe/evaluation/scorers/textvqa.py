"""TextVQA: a word read off a picture, always judged by the soft score over ten annotators.

The answers are compared under the project's one normalisation, not under EvalAI's processor. That one turns "none" into
0, restores contractions and deletes inner punctuation, and it can make a reference empty, which an empty answer then
matches; a reader would have to know three tables to tell why an answer was right. The price: number words and digits
are different answers here.
"""

from __future__ import annotations

from llava_cmoe.evaluation.scorers.base import Reference, Score
from llava_cmoe.evaluation.scorers.short_answer import soft_score


def score(prediction: str, reference: Reference) -> Score:
    """0, .3, .6, .9 or 1 by the number of annotators who gave this answer; a row without ten answers is an error."""
    return soft_score(prediction, reference)
