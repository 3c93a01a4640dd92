"""TaskSpec and TaskSequence: which tasks there are, where their files lie and how they are judged; records only.

`sequences.py` reads them from YAML, `places.py` finds their files, `coin.py` reads their rows; the scorer is only a
name here and is looked up by the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from llava_cmoe.settings.base import RecipeError, Settings
from llava_cmoe.settings.names import InnerPath
from llava_cmoe.settings.recipes import nearest, parse_settings

Geometry = Literal["pad", "crop"]
"""How a picture becomes square: padded on the centre (all of it is seen), or cropped to its centre."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Spellings = Annotated[tuple[InnerPath, ...], BeforeValidator(_listed), Field(min_length=1)]
"""A path, or all the ways in which it is spelled by those who publish or copy the data; the one that exists counts."""

RowCount = Annotated[int, Field(ge=0)] | tuple[int, int]
"""A number of rows, or the least and the most where sources differ."""

COIN_FOLDERS = tuple(
    f"{stem}_{kind}"
    for stem in ("Instructions", "Instruction")
    for kind in ("Original", "Type1", "Diverse", "Type2", "10Type")
)


class Published(Settings):
    """How many rows the publisher says there are; another number is told by `data check` and stops nothing."""

    train: RowCount | None = None
    """Training rows: a number, or the least and the most; unknown when absent."""
    evaluate: RowCount | None = None
    """Evaluation rows, in the same way."""


class TaskSpec(Settings):
    """One task: a training file, an evaluation file, and how its answers are generated and judged."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """Name of the task in tables and folder names, e.g. `scienceqa`."""
    train: Spellings
    """Training rows, relative to the instruction folder, e.g. `ScienceQA/train.json`, or a list of spellings."""
    evaluate: Spellings
    """Evaluation rows, relative to the instruction folder, e.g. `ScienceQA/test.json`, or a list of spellings."""
    scorer: str
    """Name of the scorer that judges the answers."""
    max_new_tokens: int = Field(gt=0)
    """Longest answer that is generated, in tokens."""
    annotations: Spellings | None = None
    """File with what the evaluation rows lack, relative to the data root: choices (scorer `scienceqa`), ten answers
    (`textvqa`), all captions of a picture in COCO's format (`captions`)."""
    geometry: Geometry = "pad"
    """How a picture becomes square before the image processor sees it."""
    folder: Spellings = COIN_FOLDERS
    """Instruction folder of a data root, and its other spellings; CoIN's, of any kind, when absent."""
    images: Spellings = ("cl_dataset",)
    """Folder that rows name pictures from, relative to the data root, and its other spellings."""
    evaluate_images: Spellings | None = None
    """The same for evaluation rows, where they have a folder of their own."""
    instruction: str | None = None
    """Words that every question of the task holds; `data check` counts the rows without them."""
    published: Published | None = None
    """Row counts that its publisher states."""
    lost: tuple[str, ...] = ()
    """Pictures that the published rows name and nobody can get any more; rows that show them are left out."""
    notes: tuple[str, ...] = ()
    """What its publisher does otherwise, or does not document (`guess: ...`); told by `data check`."""
    version: int = Field(1, gt=0)
    """Raised when the entry's rows, instruction or scoring change: numbers of two versions are not comparable."""


class Source(Settings):
    """Where a part of a data root comes from (`llava-cmoe data fetch`)."""

    name: str = Field(min_length=1)
    """What it is called, e.g. `COCO 2014`."""
    holds: str
    """What it gives."""
    to: InnerPath = "."
    """Where that goes in the data root."""
    hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Dataset repository on the Hugging Face Hub that can be downloaded without further ado, e.g. `Zacks-Chen/CoIN`."""
    files: tuple[str, ...] = ("*",)
    """Patterns of the repository's files to download; `{folder}` stands for each spelling of the tasks' folder."""
    page: str | None = None
    """Web page or archive to get it from by hand."""
    licence: str = "see the source"
    """Its licence as the source states it."""
    by_hand: str | None = None
    """What has to be done by hand."""


class TaskSequence(Settings):
    """Tasks in the order in which they are learned."""

    name: str = Field(min_length=1)
    """Name of the sequence in reports."""
    tasks: tuple[TaskSpec, ...]
    """The tasks, at least one; no name occurs twice."""
    sources: tuple[Source, ...] = ()
    """Where their data comes from."""

    @field_validator("tasks")
    @classmethod
    def _names_are_distinct(cls, tasks: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
        names = [task.name for task in tasks]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if not tasks:
            raise ValueError("a sequence needs at least one task")
        if doubled:
            raise ValueError(f"task names occur more than once: {', '.join(doubled)}")
        return tasks

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names, in order."""
        return tuple(task.name for task in self.tasks)

    def select(self, names: Sequence[str]) -> TaskSequence:
        """The sequence of only these tasks, in this order.

        Raises:
            RecipeError: an unknown name (with the nearest known one), a doubled name, or none at all.
        """
        by_name = {task.name: task for task in self.tasks}
        for name in names:
            if name not in by_name:
                raise RecipeError(f"sequence {self.name}: unknown task {name}; did you mean {nearest(name, by_name)}?")
        document = dict(self) | {"tasks": [by_name[name] for name in names]}
        return parse_settings(TaskSequence, document, source=f"sequence {self.name}")
