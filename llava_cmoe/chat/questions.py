"""A file of questions for a run, and its answers as programs read them: JSON lines in, JSON lines out.

{"question": "Which colour is it?", "image": "picture.png"}       the picture beside the file; none may be named
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.settings.base import shown
from llava_cmoe.settings.plain_json import parse_json


@dataclass(frozen=True)
class Asked:
    """One line: what is asked, about which picture."""

    question: str
    image: Path | None


def read_questions(file: Path) -> list[Asked]:
    """All questions, before any is answered.

    Raises:
        DataError: a line is none, or names what is not known; says which.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not at U+2028, which a text may hold
    except UnicodeDecodeError as error:
        raise DataError(Problem(file, f"is not UTF-8 text ({error})")) from error
    asked = [one for number, line in enumerate(lines, 1) if line.strip() for one in _asked(file, number, line)]
    if not asked:
        raise DataError(Problem(file, 'holds no question; write one object a line, as {"question": "..."}'))
    return asked


def _asked(file: Path, number: int, line: str) -> Iterator[Asked]:
    def wrong(reason: str) -> DataError:
        return DataError(Problem(file, f"line {number}: {reason}"))

    try:
        row = parse_json(line)
    except ValueError as error:
        raise wrong(f"is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise wrong(f"is {shown(row)}, not an object")
    if strange := sorted(map(str, row.keys() - {"question", "image"})):
        raise wrong(f"has {shown(strange[0])}; a line has question and image")
    text, image = row.get("question"), row.get("image")
    if not isinstance(text, str) or not text.strip():
        raise wrong(f"its question is {shown(text)}; it is a text that says something")
    if image is not None and (not isinstance(image, str) or not image):
        raise wrong(f"its image is {shown(image)}; it is the name of a file, or null")
    yield Asked(text, None if image is None else file.parent / image)
