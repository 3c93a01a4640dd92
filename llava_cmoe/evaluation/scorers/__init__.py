"""The table of scorers: a task names one of them, a recipe the protocol; nothing else knows how answers are judged.

Protocol `strict`: what CoIN should have measured. Predictions are joined by id (`joining.py`), an empty answer is
wrong, and every extraction accepts the forms written in its file and nothing else. Version 2 keeps an article that is a
letter or an initial, reads signs and scales of numbers, holds counts and years exactly, and compares texts in one
Unicode spelling; its `vqa_soft` takes any number of answers.

Protocol `coin`: CoIN's released scripts as they are, for the eight tasks that they judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llava_cmoe.evaluation.scorers import (
    captions,
    grounding,
    llm_judge,
    numeric,
    scienceqa,
    short_answer,
    textvqa,
    vqa_soft,
)
from llava_cmoe.evaluation.scorers.base import Builder, Reference, Score, Scorer, TaskScore, each
from llava_cmoe.evaluation.scorers.coin import gqa as coin_gqa
from llava_cmoe.evaluation.scorers.coin import grounding as coin_grounding
from llava_cmoe.evaluation.scorers.coin import imagenet as coin_imagenet
from llava_cmoe.evaluation.scorers.coin import ocrvqa as coin_ocrvqa
from llava_cmoe.evaluation.scorers.coin import one_answer as coin_one_answer
from llava_cmoe.evaluation.scorers.coin import scienceqa as coin_scienceqa
from llava_cmoe.evaluation.scorers.coin import textvqa as coin_textvqa
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.evaluation import EvaluationSettings

__all__ = ["PROTOCOLS", "Protocol", "Reference", "Score", "Scorer", "TaskScore", "get_scorer"]


@dataclass(frozen=True)
class Protocol:
    """One way to judge tasks.

    Attributes:
        version: raised whenever any answer would be judged differently; results of two versions are not comparable.
        scorers: name of a scorer to what makes it.
    """

    version: int
    scorers: Mapping[str, Builder]


PROTOCOLS = {
    "strict": Protocol(
        version=2,
        scorers={
            "scienceqa": each(scienceqa.score),
            "textvqa": each(textvqa.score),
            "imagenet": each(short_answer.score),
            "gqa": each(short_answer.score),
            "vizwiz": each(short_answer.score),
            "grounding": each(grounding.score),
            "vqav2": each(short_answer.score),
            "ocrvqa": each(short_answer.score),
            "vqa_soft": each(vqa_soft.score),
            "numeric": each(numeric.score),
            "captions": captions.build,
            "llm_judge": llm_judge.build,
        },
    ),
    "coin": Protocol(
        version=1,
        scorers={
            "scienceqa": each(coin_scienceqa.score),
            "textvqa": each(coin_textvqa.score),
            "imagenet": each(coin_imagenet.score),
            "gqa": each(coin_gqa.score),
            "vizwiz": each(coin_one_answer.score),
            "grounding": each(coin_grounding.score),
            "vqav2": each(coin_one_answer.score),
            "ocrvqa": each(coin_ocrvqa.score),
        },
    ),
}


def get_scorer(name: str, settings: EvaluationSettings) -> Scorer:
    """The scorer of this name in the protocol of the settings.

    Raises:
        RecipeError: no scorer has this name; tells all names. Or the scorer lacks something, which is told.
    """
    scorers = PROTOCOLS[settings.protocol].scorers
    if name not in scorers:
        raise RecipeError(
            f"unknown scorer {name!r} in protocol {settings.protocol}; a task's scorer is one of: {', '.join(scorers)}"
        )
    return scorers[name](settings)
