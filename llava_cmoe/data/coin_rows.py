"""One raw row of a CoIN file, checked field by field and turned into a canonical row.

Files, folders and rows' places in them are `coin.py`'s, fields that are not read `fields.py`'s, what a task's scorer
demands `demands.py`'s; here a row is an object, and what is wrong with it a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from llava_cmoe.data.demands import BOXED, CHOSEN, SEVERAL_ANSWERS
from llava_cmoe.data.fields import MEDIA
from llava_cmoe.data.picture_folder import PictureFolder
from llava_cmoe.data.problems import Unusable
from llava_cmoe.data.rows import MARKER, EvalRow, TrainRow, Turn, question
from llava_cmoe.data.spelling import breaks_lines, is_blank, other_spelling_on_disk, spelled_out
from llava_cmoe.settings.base import shown

LONGEST_ID = 500
"""Characters; ids of published data have some dozens."""

LARGEST_SIDE = 2**31 - 1
"""Pixels that a canonical row can hold."""


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list) and not value:
        return "an empty array"
    return {dict: "an object", list: "an array", str: "a string", type(None): "null"}.get(type(value), shown(value))


def row_id_of(raw: object) -> str:
    """The row's `question_id` or `id` as a string."""
    if not isinstance(raw, dict):
        raise Unusable(f"a row is an object, found {kind_of(raw)}")
    row_id = raw.get("question_id", raw.get("id"))
    if isinstance(row_id, bool) or not isinstance(row_id, (int, str)) or row_id == "":
        raise Unusable("no id (`id` or `question_id`, a string or a whole number)")
    text = str(row_id)
    if is_blank(text) or len(text) > LONGEST_ID or any(map(breaks_lines, text)):
        raise Unusable(
            f"the id {shown(text)} cannot stand in a file of answers: it is blank, or longer than {LONGEST_ID} "
            "characters, or holds line breaks, control characters or signs that turn text around; give it a plain one"
        )
    return text


def train_row(raw: Mapping[str, Any], row_id: str, pictures: PictureFolder) -> TrainRow:
    """A canonical training row."""
    conversations = raw.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise Unusable("no conversations")
    turns = [_turn(turn, number) for number, turn in enumerate(conversations)]
    if turns[-1]["role"] != "assistant":
        raise Unusable("wrong turn order: the conversation ends with human, the last turn must be from gpt")
    name = _picture_name(raw)
    _check_marker(turns, has_image=name is not None)
    for number, turn in enumerate(turns):
        if turn["role"] == "user":
            turn["text"] = question(turn["text"], has_image=number == 0 and name is not None)
    return {"id": row_id, "image": _image(name, pictures), "turns": turns}


def _turn(turn: object, number: int) -> Turn:
    speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    expected: Literal["human", "gpt"] = "gpt" if number % 2 else "human"
    if speaker != expected:
        raise Unusable(f"wrong turn order: turn {number} must be from {expected}, found {shown(speaker)}")
    if not isinstance(value, str) or is_blank(value):
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


def _picture_name(raw: Mapping[str, Any]) -> object:
    """What `image` names, or `images` with one entry; None in a text-only row."""
    names: list[object] = []
    for key in ("image", "images"):
        value = raw.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if len(listed) > 1:
            raise Unusable(f"`{key}` names {len(listed)} pictures; {MEDIA}")
        names += [name for name in listed if name not in names]
    if len(names) > 1:
        raise Unusable(f"`image` and `images` name different pictures; {MEDIA}")
    return names[0] if names else None


def _image(name: object, pictures: PictureFolder) -> str | None:
    if name is None:
        return None
    try:
        return pictures.path_of(name)
    except Unusable as error:
        raise Unusable(f"{error}{_other_spelling(name, pictures)}") from error


def _other_spelling(name: object, pictures: PictureFolder) -> str:
    """A hint where the picture is there in another Unicode form, which looks the same in a message."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    inner = parts[1:] if parts[:1] == (pictures.folder.name,) else parts
    if not inner or {"/", ".."}.intersection(inner) or "\0" in str(name):
        return ""
    there = other_spelling_on_disk(pictures.folder.joinpath(*inner))
    if there is None:
        return ""
    asked = pictures.folder.joinpath(*inner).parts[len(there.parts) - 1]
    return (
        f"; on disk it is there in another Unicode form: the row says {spelled_out(asked)}, the disk "
        f"{spelled_out(there.name)}; rename either"
    )


def eval_row(raw: Mapping[str, Any], row_id: str, pictures: PictureFolder, scorer: str) -> EvalRow:
    """A canonical evaluation row, before annotations complete it.

    The truth stands in `answer`; grounding's in `answer_bbox`. An `answer` that is a list of strings is read for
    scorers that take several: the first becomes `answer`, all of them `answers`. A row may also have its annotators'
    answers in `answers`, and ScienceQA's options in `choices`; a task's annotations take the place of either.
    """
    text = raw.get("text")
    if not isinstance(text, str) or is_blank(text):
        raise Unusable("no text (the question)")
    name = _picture_name(raw)
    if name is not None and MARKER not in text:  # evaluation files leave the marker out, training files do not
        text = f"{MARKER}\n{text}"
    _check_marker([{"role": "user", "text": text}], has_image=name is not None)
    has_box = scorer in BOXED
    answers = _answers(raw, scorer)
    return {
        "id": row_id,
        "image": _image(name, pictures),
        "turns": [{"role": "user", "text": question(text, has_image=name is not None)}],
        "answer": answers[0],
        "answers": _all_answers(raw, answers, scorer),
        "box": box_of(answers[0]) if has_box else [],
        "size": _size(raw) if has_box else [],
        "choices": texts_of(raw["choices"], "choices") if scorer in CHOSEN and raw.get("choices") else [],
    }


def _answers(raw: Mapping[str, Any], scorer: str) -> list[str]:
    """What stands in `answer` (or `answer_bbox`), one or several."""
    key, several = "answer_bbox" if scorer in BOXED else "answer", scorer in SEVERAL_ANSWERS
    given = raw.get(key)
    if given is None and several and raw.get("answers"):
        return texts_of(raw["answers"], "answers")
    listed = given if several and isinstance(given, list) else [given]
    answers = [answer for answer in listed if isinstance(answer, str) and not is_blank(answer)]
    if not answers or len(answers) < len(listed):
        raise Unusable(f"no {key} ({'a string, or a list of them' if several else 'a string'})")
    return answers


def _all_answers(raw: Mapping[str, Any], answers: list[str], scorer: str) -> list[str]:
    if scorer in BOXED | CHOSEN:
        return []
    if raw.get("answers"):
        return texts_of(raw["answers"], "answers")
    return answers if scorer in SEVERAL_ANSWERS else []


def texts_of(value: object, name: str) -> list[str]:
    """Choices, or the answers of annotators: a list of texts, numbers, or objects as VQA has them (`{"answer": ...}`).

    Raises:
        Unusable: one text alone, which a loop would read letter by letter, or anything else; names the field.
    """
    if isinstance(value, str):
        raise Unusable(f'`{name}` is one text, {shown(value)}; write a list of texts: ["..."]')
    if not isinstance(value, list) or not value:
        raise Unusable(f"`{name}` must be a list of texts, found {kind_of(value)}")
    texts = []
    for entry in value:
        text = entry.get("answer") if isinstance(entry, dict) else entry
        if isinstance(text, bool) or not isinstance(text, (str, int, float)):
            raise Unusable(f"`{name}` must be a list of texts, found {kind_of(entry)} in it")
        texts.append(str(text))
    return texts


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
        raise Unusable(f"malformed answer_bbox {shown(text)}; expected [x1, y1, x2, y2], each from 0 to 1")
    if box[0] > box[2] or box[1] > box[3]:
        raise Unusable(f"malformed answer_bbox {shown(text)}; x1 <= x2 and y1 <= y2 must hold")
    return box


def _size(raw: Mapping[str, Any]) -> list[int]:
    """The picture's width and height, which only the released scorer reads; empty where the row does not tell."""
    size = raw.get("size", [])
    if (
        not isinstance(size, list)
        or len(size) not in (0, 2)
        or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in size)
    ):
        raise Unusable(f"malformed size {shown(size)}; expected [width, height] in pixels")
    return size
