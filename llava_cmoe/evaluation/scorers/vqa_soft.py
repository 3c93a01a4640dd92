"""The VQA accuracy over as many annotators as a row has: for data that, unlike TextVQA's, do not come with ten each.

An answer counts min(n / 3, 1), n annotators having given it, averaged over all ways to leave one annotator out. For ten
that is 0, .3, .6, .9, 1. Where fewer than three others are left, all of them are enough, so that an answer of everybody
is always fully right: for two to four annotators the score is the share that gave the answer, and one alone decides.
Answers are compared under the project's one normalisation, as everywhere in `strict`.
"""

from __future__ import annotations

from llava_cmoe.evaluation.scorers.base import Reference, Score
from llava_cmoe.evaluation.scorers.normalise import normalise

ENOUGH = 3
"""Annotators, among the others, who make an answer fully right."""


def score(prediction: str, reference: Reference) -> Score:
    """From 0 to 1 by the number of annotators who gave this answer; a row without a list has its one answer."""
    answers = reference.answers or (reference.answer,)
    given, num_annotators = normalise(prediction), len(answers)
    agreeing = sum(given != "" and given == normalise(answer) for answer in answers)
    if num_annotators == 1:
        return Score(float(agreeing))
    enough = min(ENOUGH, num_annotators - 1)
    left_out = agreeing * min(agreeing - 1, enough) + (num_annotators - agreeing) * min(agreeing, enough)
    return Score(left_out / (enough * num_annotators))
