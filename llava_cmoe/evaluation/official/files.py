"""Reads a task's official files, and answers of any model in LLaVA's format, and names the place of what is wrong.

    {"question_id": 4, "prompt": "...", "text": "A", "answer_id": "...", "model_id": "...", "metadata": {}}     a line

What the answers are worth is left to `released_scripts.py` (as CoIN's scripts do it) and `joining.py` (protocol
`strict`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_cmoe.settings.base import shown
from llava_cmoe.settings.plain_json import parse_json

ROWS = {
    "ScienceQA": "test.json",
    "TextVQA": "val.json",
    "ImageNet": "test.json",
    "GQA": "test.json",
    "VizWiz": "val.json",
    "Grounding": "test.json",
    "VQAv2": "val.json",
    "OCRVQA": "test.json",
}
"""CoIN's tasks and the file of the rows on which each is measured."""


class ScoringError(ValueError):
    """Files that no score can be computed from; the message names the file, the row and the fix."""


@dataclass(frozen=True)
class Line:
    """A line of an answers file: `place` is where it stands, `answer` the JSON object."""

    place: str
    answer: dict[str, Any]


@dataclass(frozen=True)
class Annotations:
    """The folder with a task's official files.

    Attributes:
        folder: where they lie.
        read: names of those that were read.
        strict: whether an object with a key twice is an error; the released scripts keep the last one.
    """

    folder: Path
    read: list[str] = field(default_factory=list)
    strict: bool = False

    def load(self, name: str) -> Any:
        """One file as JSON.

        Raises:
            ScoringError: it is not there, no JSON, or (if `strict`) has a key twice in one object.
        """
        path = self.folder / name
        with blamed(str(path), "put the official file there"):
            text = path.read_text(encoding="utf-8")
            document = parse_json(text) if self.strict else json.loads(text)
        self.read.append(name)
        return document

    def rows(self, task: str) -> tuple[str, Any]:
        """Name and content of the file of a task's rows: the official one, or the other split's where only that is."""
        official = ROWS[task]
        other = {"test.json": "val.json", "val.json": "test.json"}[official]
        name = other if not (self.folder / official).exists() and (self.folder / other).exists() else official
        return name, self.load(name)


def task_named(name: str) -> str:
    """CoIN's spelling of a task's name.

    Raises:
        ScoringError: CoIN has no such task.
    """
    for task in ROWS:
        if task.lower() == name.lower():
            return task
    raise ScoringError(f"unknown task {shown(name)}; it is one of: {', '.join(ROWS)}")


def read_lines(path: Path) -> list[Line]:
    """All lines of an answers file; what its objects hold is not looked at.

    Raises:
        ScoringError: the file is not there, or a line, be it empty, is not a JSON object.
    """
    lines = []
    with blamed(str(path), "give an answers file (JSON lines)"):
        texts = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(texts[:-1] if texts[-1] == "" else texts, start=1):
        place = f"{path}:{number}"
        with blamed(place, "a line is one answer as a JSON object; mend or delete it"):
            answer = json.loads(text)
            if not isinstance(answer, dict):
                raise ValueError("not a JSON object")
        lines.append(Line(place, answer))
    return lines


@contextmanager
def blamed(place: str, fix: str) -> Iterator[None]:
    """Turn whatever goes wrong with someone's file into an error that names the place and the fix."""
    try:
        yield
    except OSError as error:
        raise ScoringError(f"{place}: cannot be read ({error.strerror}); {fix}") from error
    except KeyError as error:
        raise ScoringError(f"{place}: no {error}; {fix}") from error
    except (IndexError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ScoringError(f"{place}: {error}; {fix}") from error
