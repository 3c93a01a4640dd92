"""The canonical row: what every reader of files produces and every encoder takes.

Reading it from disk is `coin.py`'s job, turning it into tokens `conversation.py`'s.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from datasets import Features, List, Value

MARKER = "<image>"
"""Stands in the first user turn, exactly once, where the picture belongs; absent in text-only rows."""


class Turn(TypedDict):
    """One turn of a conversation; user and assistant take turns, the user first."""

    role: Literal["user", "assistant"]
    text: str


class TrainRow(TypedDict):
    """A conversation to learn: `image` is an absolute path, or None in a text-only row."""

    id: str
    image: str | None
    turns: list[Turn]


class EvalRow(TrainRow):
    """One user turn and its answer.

    `answers` holds ten annotators' answers, `box` x1, y1, x2, y2 on the padded square in [0, 1], `choices` the options,
    and `size` the picture's width and height in pixels; each is empty where the task has none.
    """

    answer: str
    answers: list[str]
    box: list[float]
    choices: list[str]
    size: list[int]


TRAIN_FEATURES = Features(
    {
        "id": Value("string"),
        "image": Value("string"),
        "turns": List({"role": Value("string"), "text": Value("string")}),
    }
)
EVAL_FEATURES = Features(
    {
        **TRAIN_FEATURES,
        "answer": Value("string"),
        "answers": List(Value("string")),
        "box": List(Value("float64")),
        "choices": List(Value("string")),
        "size": List(Value("int32")),
    }
)
