"""The VQA accuracy over as many annotators as a row has: for data that, unlike TextVQA's, do not come with ten each.

An answer counts min(n / 3, 1), n annotators having given it, averaged over all ways to leave one annotator out. For ten
that is 0, .3, .6, .9, 1. Answers are compared under the project's one normalisation, as everywhere in `strict`.
"""

from __future__ import annotations

from llava_cmoe.evaluation.scorers.base import Reference, Score
from llava_cmoe.evaluation.scorers.normalise import normalise

ENOUGH = 3
"""Annotators, among the others, who make an answer fully right."""


def score(prediction: str, reference: Reference) -> Score:
    """From 0 to 1 by the number of annotators who gave this answer.

    Raises:
        ValueError: too few annotators for any answer to be fully right.
    """
    num_annotators = len(reference.answers)
    if num_annotators <= ENOUGH:
        raise ValueError(f"the row has {num_annotators} annotators' answers, more than {ENOUGH} are needed")
    given = normalise(prediction)
    agreeing = sum(given != "" and given == normalise(answer) for answer in reference.answers)
    left_out = agreeing * min(agreeing - 1, ENOUGH) + (num_annotators - agreeing) * min(agreeing, ENOUGH)
    return Score(left_out / (ENOUGH * num_annotators))
