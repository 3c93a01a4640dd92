"""TextVQA as released: the soft score over ten annotators, answers compared as EvalAI's processor leaves them.

An annotator's answer that consists of an article or of marks becomes empty, and an empty answer then earns its share.
"""

from __future__ import annotations

from collections.abc import Iterable

from llava_cmoe.data.demands import NUM_ANNOTATORS
from llava_cmoe.evaluation.scorers.base import Reference, Score
from llava_cmoe.evaluation.scorers.coin.evalai import process


def soft_score(text: str, answers: Iterable[str]) -> float:
    """0, .3, .6, .9 or 1 by the number of annotators who gave this answer; their order decides the last bit, as there.

    Raises:
        ValueError: not ten answers, at which the released script stops.
    """
    given, processed = process(text), [process(answer) for answer in answers]
    if len(processed) != NUM_ANNOTATORS:
        raise ValueError(f"{len(processed)} annotators' answers where ten are needed")
    same = [answer == given for answer in processed]
    return sum(min(1.0, (sum(same) - left_out) / 3) for left_out in same) / NUM_ANNOTATORS if any(same) else 0.0


def score(prediction: str, reference: Reference) -> Score:
    """The soft score of a run's answer."""
    return Score(soft_score(prediction, reference.answers))
