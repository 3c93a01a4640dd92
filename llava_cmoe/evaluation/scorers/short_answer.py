"""A word or phrase against its reference: exact after the one normalisation, or soft where ten annotators answered.

Scores ImageNet, GQA, VizWiz, VQAv2 and OCRVQA. The released CoIN scripts count an empty ImageNet answer as right
(every string contains it); here an empty answer is wrong everywhere.
"""

from __future__ import annotations

from llava_cmoe.data.demands import ten_answers
from llava_cmoe.evaluation.scorers.base import Reference, Score
from llava_cmoe.evaluation.scorers.normalise import normalise

SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Accuracy by the number of annotators who gave the answer; four or more make it fully right.

The mean of min(n/3, 1) over the ten ways to leave one annotator out, written out so that no rounding enters."""


def score(prediction: str, reference: Reference) -> Score:
    """Soft score if the row has ten annotators' answers, else 1 for the reference answer and 0 for anything else."""
    if reference.answers:
        return soft_score(prediction, reference)
    given = normalise(prediction)
    return Score(float(given != "" and given == normalise(reference.answer)))


def soft_score(prediction: str, reference: Reference) -> Score:
    """The VQA accuracy of one answer among ten annotators'.

    Raises:
        ValueError: not exactly ten answers, so that the counts would mean something else.
    """
    ten_answers(reference)
    given = normalise(prediction)
    num_agreeing = sum(given != "" and given == normalise(answer) for answer in reference.answers)
    return Score(SOFT_SCORES[min(num_agreeing, len(SOFT_SCORES) - 1)])
