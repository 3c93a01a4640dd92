"""A word or phrase against its reference: exact after the one normalisation, or soft where ten annotators answered.

Scores ImageNet, GQA, VizWiz, VQAv2 and OCRVQA. The released CoIN scripts count an empty ImageNet answer as right
(every string contains it); here an empty answer is wrong everywhere.
"""

from __future__ import annotations

from llava_cmoe.evaluation.scorers.base import Reference, Score
from llava_cmoe.evaluation.scorers.normalise import normalise

NUM_ANNOTATORS = 10

SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Accuracy by the number of annotators who gave the answer; four or more make it fully right.

The mean of min(n/3, 1) over the ten ways to leave one annotator out, written out so that no rounding enters."""


def score(prediction: str, reference: Reference) -> Score:
    """Soft score if the row has ten annotators' answers, else 1 for the reference answer and 0 for anything else."""
    if reference.answers:
        return soft_score(prediction, reference.answers)
    given = normalise(prediction)
    return Score(float(given != "" and given == normalise(reference.answer)))


def soft_score(prediction: str, answers: tuple[str, ...]) -> Score:
    """The VQA accuracy of one answer among ten.

    Raises:
        ValueError: not exactly ten answers, so that the counts would mean something else.
    """
    if len(answers) != NUM_ANNOTATORS:
        raise ValueError(
            f"the row has {len(answers)} annotators' answers, the soft score needs {NUM_ANNOTATORS}: "
            "check the task's annotation file"
        )
    given = normalise(prediction)
    num_agreeing = sum(given != "" and given == normalise(answer) for answer in answers)
    return Score(SOFT_SCORES[min(num_agreeing, len(SOFT_SCORES) - 1)])
