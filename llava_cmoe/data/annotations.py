"""What evaluation rows lack, read from the datasets' own files: choices, ten answers, or all captions of a picture.

| scorer | file | joined by |
| --- | --- | --- |
| `scienceqa` | ScienceQA's `problems.json` | id |
| `textvqa` | `TextVQA_0.5.1_val.json` | question id |
| `captions` | captions in COCO's format | path of the picture, as far as `file_name` gives it |

A key that two entries share, or an entry that two pictures would share, is refused: nobody could say whose it is.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from llava_cmoe.data.coin_rows import kind_of, row_id_of, texts_of
from llava_cmoe.data.problems import DataError, Problem, Unusable
from llava_cmoe.data.rows import EvalRow
from llava_cmoe.data.spelling import respell
from llava_cmoe.settings.base import shown


class Annotations(Protocol):
    """One list of texts per row."""

    def complete(self, row: EvalRow) -> None:
        """Give a row what it lacks.

        Raises:
            Unusable: nothing is annotated for it, or it cannot be told what is.
        """


@dataclass(frozen=True)
class ById:
    """Texts by a row's id.

    Attributes:
        file: where they were read from.
        column: what they are to an evaluation row.
        texts: the texts by id.
    """

    file: Path
    column: Literal["choices", "answers"]
    texts: Mapping[str, list[str]]

    def complete(self, row: EvalRow) -> None:
        """Set the row's column."""
        if row["id"] not in self.texts:
            raise Unusable(f"no entry for this id in {self.file}")
        row[self.column] = self.texts[row["id"]]


@dataclass(frozen=True)
class Captioned:
    """A picture of a caption file: its `file_name`, the same in parts and in one spelling, and all its captions."""

    name: str
    parts: tuple[str, ...]
    captions: list[str]


@dataclass(frozen=True)
class ByPicture:
    """Captions by the path of a row's picture.

    An entry is a picture's if its `file_name`, whole, ends the picture's path (the longest, where several do), or else
    if the path from the folder of pictures on ends the `file_name` (the shortest, where several do). So a bare name
    serves where it is the only one, and `day/0001.png` never gets the captions of `night/0001.png`.

    Attributes:
        file: where they were read from.
        folder: the folder of pictures, links resolved, as in a row.
        pictures: by bare file name, in one spelling.
        given: `file_name` to the id and path of the row that was given its captions.
    """

    file: Path
    folder: Path
    pictures: Mapping[str, list[Captioned]]
    given: dict[str, tuple[str, str]] = field(default_factory=dict)

    def complete(self, row: EvalRow) -> None:
        """Set the row's `answers`."""
        path = row["image"] or ""
        picture = self._picture_of(path)
        first_id, first_path = self.given.setdefault(picture.name, (row["id"], path))
        if first_path != path:
            raise Unusable(
                f"{path} would get the captions of {picture.name} in {self.file}, as {first_path} of row "
                f"{shown(first_id)} does: write paths that tell both apart as file_name"
            )
        if not picture.captions:
            raise Unusable(f"no caption for this picture ({picture.name}) in {self.file}")
        row["answers"] = picture.captions

    def _picture_of(self, path: str) -> Captioned:
        parts = _parts(path)
        below = _parts(os.path.relpath(path, self.folder)) if path else ()
        alike = self.pictures.get(parts[-1] if parts else "", [])
        found = [picture for picture in alike if parts[-len(picture.parts) :] == picture.parts]
        if found:
            return max(found, key=lambda picture: len(picture.parts))
        found = [picture for picture in alike if picture.parts[-len(below) :] == below]
        shortest = min((len(picture.parts) for picture in found), default=0)
        found = [picture for picture in found if len(picture.parts) == shortest]
        if len(found) > 1:
            names = " and ".join(picture.name for picture in found)
            raise Unusable(f"several entries for this picture ({PurePosixPath(path).name}) in {self.file}: {names}")
        if not found:
            there = f"; there is {alike[0].name}" if alike else ""
            raise Unusable(f"no entry for this picture ({PurePosixPath(path).name}) in {self.file}{there}")
        return found[0]


def read_annotations(file: Path, document: Any, scorer: str, folder: Path) -> Annotations:
    """What a task's scorer needs beside its rows, from the parsed JSON of `file`.

    Args:
        file: for messages.
        document: what it holds.
        scorer: the task's.
        folder: of the pictures that rows name.

    Raises:
        DataError: not the file that this scorer needs, a key that occurs twice, or a scorer that needs no file.
    """
    if scorer not in READERS:
        reason = f"annotations are read for {', '.join(READERS)}, not for scorer {scorer}"
        raise DataError(Problem(file, reason))
    try:
        return READERS[scorer](file, document, folder)
    except Unusable as error:
        raise DataError(Problem(file, str(error))) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(Problem(file, f"not the annotations of {scorer} ({shown(error)})")) from error


def unique(keys: Iterable[Any], what: str) -> None:
    """Refuse a key that occurs twice.

    Raises:
        Unusable: names the key and the places of both entries, from 0.
    """
    first: dict[Any, int] = {}
    for place, key in enumerate(keys):
        if first.setdefault(key, place) != place:
            raise Unusable(f"entries {first[key]} and {place} have the same {what} {shown(key)}; keep one of them")


def choices_by_id(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """The options of each of ScienceQA's problems.

    Raises:
        Unusable: an entry's choices are no list of texts; names the entry.
    """
    return {pid: _texts(problem["choices"], "choices", f"problem {shown(pid)}") for pid, problem in document.items()}


def answers_by_id(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """The annotators' answers to each of TextVQA's questions.

    Raises:
        Unusable: an id that occurs twice, or answers that are no list of texts; names the entries.
    """
    entries = document["data"]
    ids = [row_id_of({"question_id": entry["question_id"]}) for entry in entries]
    unique(ids, "question_id")
    return {
        question_id: _texts(entry["answers"], "answers", f"question {shown(question_id)}")
        for question_id, entry in zip(ids, entries, strict=True)
    }


def _texts(value: object, name: str, where: str) -> list[str]:
    try:
        return texts_of(value, name)
    except Unusable as error:
        raise Unusable(f"{where}: {error}") from error


def _scienceqa(file: Path, document: Any, folder: Path) -> Annotations:
    return ById(file, "choices", choices_by_id(document))


def _textvqa(file: Path, document: Any, folder: Path) -> Annotations:
    return ById(file, "answers", answers_by_id(document))


def _coco_captions(file: Path, document: Any, folder: Path) -> Annotations:
    images = document["images"]
    unique((image["id"] for image in images), "image id")
    unique((_parts(image["file_name"]) for image in images), "file_name")
    captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
    for number, annotation in enumerate(document["annotations"]):
        caption = annotation["caption"]
        if not isinstance(caption, str):
            raise Unusable(f"annotation {number}: a caption is one text, found {kind_of(caption)}")
        captions[annotation["image_id"]].append(caption)
    pictures = defaultdict(list)
    for image in images:
        parts = _parts(image["file_name"])
        pictures[parts[-1]].append(Captioned(image["file_name"], parts, captions[image["id"]]))
    return ByPicture(file, Path(os.path.realpath(folder)), pictures)


def _parts(path: str) -> tuple[str, ...]:
    """A path's names in one spelling, from the first folder on."""
    return tuple(respell(part) for part in PurePosixPath(path).parts if part != "/")


READERS: Mapping[str, Callable[[Path, Any, Path], Annotations]] = {
    "scienceqa": _scienceqa,
    "textvqa": _textvqa,
    "captions": _coco_captions,
}
