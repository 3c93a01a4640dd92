"""One raw row of a CoIN file, checked field by field and turned into a canonical row.

Files, folders and rows' places in them are `coin.py`'s; here a row is an object, and what is wrong with it a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from llava_cmoe.data.picture_folder import PictureFolder
from llava_cmoe.data.problems import Unusable
from llava_cmoe.data.rows import MARKER, EvalRow, TrainRow, Turn


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list) and not value:
        return "an empty array"
    return {dict: "an object", list: "an array", str: "a string", type(None): "null"}.get(type(value), repr(value))


def row_id_of(raw: object) -> str:
    """The row's `question_id` or `id` as a string."""
    if not isinstance(raw, dict):
        raise Unusable(f"a row is an object, found {kind_of(raw)}")
    row_id = raw.get("question_id", raw.get("id"))
    if isinstance(row_id, bool) or not isinstance(row_id, (int, str)) or row_id == "":
        raise Unusable("no id (`id` or `question_id`, a string or a whole number)")
    return str(row_id)


def train_row(raw: Mapping[str, Any], row_id: str, pictures: PictureFolder) -> TrainRow:
    """A canonical training row."""
    conversations = raw.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise Unusable("no conversations")
    turns = [_turn(turn, number) for number, turn in enumerate(conversations)]
    if turns[-1]["role"] != "assistant":
        raise Unusable("wrong turn order: the conversation ends with human, the last turn must be from gpt")
    _check_marker(turns, has_image=raw.get("image") is not None)
    return {"id": row_id, "image": _image(raw, pictures), "turns": turns}


def _turn(turn: object, number: int) -> Turn:
    speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    expected: Literal["human", "gpt"] = "gpt" if number % 2 else "human"
    if speaker != expected:
        raise Unusable(f"wrong turn order: turn {number} must be from {expected}, found {speaker!r}")
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"turn {number} ({expected}) has no text")
    return {"role": "assistant" if expected == "gpt" else "user", "text": value}


def _check_marker(turns: list[Turn], has_image: bool) -> None:
    counts = [turn["text"].count(MARKER) for turn in turns]
    if not has_image and any(counts):
        raise Unusable(f"{MARKER} in the text, but the row has no image")
    if has_image and not any(counts):
        raise Unusable(f"the row has an image, but no {MARKER} in its text")
    if sum(counts) > 1:
        raise Unusable(f"{MARKER} occurs {sum(counts)} times, expected once")
    if has_image and not counts[0]:
        raise Unusable(f"{MARKER} occurs in turn {counts.index(1)}, expected in the first")


def _image(raw: Mapping[str, Any], pictures: PictureFolder) -> str | None:
    return None if raw.get("image") is None else pictures.path_of(raw["image"])


def eval_row(raw: Mapping[str, Any], row_id: str, pictures: PictureFolder, has_box: bool, several: bool) -> EvalRow:
    """A canonical evaluation row, before annotations complete it.

    With `has_box`, `answer_bbox` is the answer. With `several`, an answer may be a list of strings, each of them right:
    the first becomes `answer`, all of them `answers`.
    """
    text = raw.get("text")
    if not isinstance(text, str) or not text.strip():
        raise Unusable("no text (the question)")
    has_image = raw.get("image") is not None
    if has_image and MARKER not in text:  # evaluation files leave the marker out, training files do not
        text = f"{MARKER}\n{text}"
    turns: list[Turn] = [{"role": "user", "text": text}]
    _check_marker(turns, has_image)
    key = "answer_bbox" if has_box else "answer"
    given = raw.get(key)
    listed = given if several and isinstance(given, list) else [given]
    answers = [answer for answer in listed if isinstance(answer, str) and answer.strip()]
    if not answers or len(answers) < len(listed):
        raise Unusable(f"no {key} ({'a string, or a list of them' if several else 'a string'})")
    return {
        "id": row_id,
        "image": _image(raw, pictures),
        "turns": turns,
        "answer": answers[0],
        "answers": answers if several else [],
        "box": box_of(answers[0]) if has_box else [],
        "size": _size(raw) if has_box else [],
        "choices": [],
    }


ROUNDING = 1e-3
"""How far a coordinate may lie outside the picture: annotators' boxes are rounded to a hundredth of a pixel."""


def box_of(text: str) -> list[float]:
    """The four coordinates of "[x1, y1, x2, y2]", in [0, 1] but for rounding, and in order."""
    inner = text.strip()
    try:
        box = [float(part) for part in inner[1:-1].split(",")]
    except ValueError:
        box = []
    bracketed = inner.startswith("[") and inner.endswith("]")
    if not bracketed or len(box) != 4 or not all(-ROUNDING <= value <= 1 + ROUNDING for value in box):
        raise Unusable(f"malformed answer_bbox {text!r}; expected [x1, y1, x2, y2], each from 0 to 1")
    if box[0] > box[2] or box[1] > box[3]:
        raise Unusable(f"malformed answer_bbox {text!r}; x1 <= x2 and y1 <= y2 must hold")
    return box


def _size(raw: Mapping[str, Any]) -> list[int]:
    """The picture's width and height, which only the released scorer reads; empty where the row does not tell."""
    size = raw.get("size", [])
    if (
        not isinstance(size, list)
        or len(size) not in (0, 2)
        or not all(type(side) is int and side > 0 for side in size)
    ):
        raise Unusable(f"malformed size {size!r}; expected [width, height] in pixels")
    return size
