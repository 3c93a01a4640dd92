"""The canonical row: what every reader of files produces and every encoder takes.

Reading it from disk is `coin.py`'s job, turning it into tokens `conversation.py`'s. What is learned and what is asked
is written alike (`question`), or a model would be asked in another way than it was taught.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from datasets import Features, List, Value

MARKER = "<image>"
"""Opens the first user turn of a row with a picture, on a line of its own; absent in text-only rows."""


def question(text: str, has_image: bool) -> str:
    r"""A user's turn, the same however a file writes it: the picture first, as LLaVA's reader does.

    Published files put the marker first or last, and end their lines in two ways; blanks around a text say nothing.

    >>> question("Where?\r\n<image>", has_image=True)
    '<image>\nWhere?'
    """
    words = text.replace("\r\n", "\n").replace("\r", "\n").replace(MARKER, "").strip()
    return f"{MARKER}\n{words}".strip() if has_image else words


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
