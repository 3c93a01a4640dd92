"""What evaluation rows lack, read from the datasets' own files: choices, ten answers, or all captions of a picture.

| scorer | file | joined by |
| --- | --- | --- |
| `scienceqa` | ScienceQA's `problems.json` | id |
| `textvqa` | `TextVQA_0.5.1_val.json` | question id |
| `captions` | captions in COCO's format | file name of the picture |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from llava_cmoe.data.problems import DataError, Problem, Unusable
from llava_cmoe.data.rows import EvalRow


@dataclass(frozen=True)
class Annotations:
    """One list of texts per row.

    Attributes:
        file: where they were read from.
        field: what they are to an evaluation row.
        by_key: the texts, by id or by file name of the picture.
        joined_by_picture: which of the two.
    """

    file: Path
    field: Literal["choices", "answers"]
    by_key: Mapping[str, list[str]]
    joined_by_picture: bool = False

    def complete(self, row: EvalRow) -> None:
        """Give a row what it lacks.

        Raises:
            Unusable: nothing is annotated for it.
        """
        key = PurePosixPath(row["image"] or "").name if self.joined_by_picture else row["id"]
        if key not in self.by_key:
            what = f"picture ({key})" if self.joined_by_picture else "id"
            raise Unusable(f"no entry for this {what} in {self.file}")
        row[self.field] = self.by_key[key]


def read_annotations(file: Path, document: Any, scorer: str) -> Annotations:
    """What a task's scorer needs beside its rows, from the parsed JSON of `file`.

    Raises:
        DataError: not the file that this scorer needs, or a scorer that needs none.
    """
    if scorer not in READERS:
        reason = f"annotations are read for {', '.join(READERS)}, not for scorer {scorer}"
        raise DataError(Problem(file, reason))
    try:
        return READERS[scorer](file, document)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(Problem(file, f"not the annotations of {scorer} ({error!r})")) from error


def _scienceqa(file: Path, document: Any) -> Annotations:
    by_id = {pid: [str(choice) for choice in problem["choices"]] for pid, problem in document.items()}
    return Annotations(file, "choices", by_id)


def _textvqa(file: Path, document: Any) -> Annotations:
    by_id = {str(entry["question_id"]): list(map(str, entry["answers"])) for entry in document["data"]}
    return Annotations(file, "answers", by_id)


def _coco_captions(file: Path, document: Any) -> Annotations:
    captions: dict[Any, list[str]] = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        captions[annotation["image_id"]].append(str(annotation["caption"]))
    by_picture = {PurePosixPath(image["file_name"]).name: captions[image["id"]] for image in document["images"]}
    return Annotations(file, "answers", by_picture, joined_by_picture=True)


READERS: Mapping[str, Callable[[Path, Any], Annotations]] = {
    "scienceqa": _scienceqa,
    "textvqa": _textvqa,
    "captions": _coco_captions,
}
