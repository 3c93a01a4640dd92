"""TaskSpec and TaskSequence: which tasks are learned, in which order, read from YAML.

Reading a task's rows is `coin.py`'s job; the scorer is only a name here and is looked up by the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from llava_cmoe.settings import RecipeError, Settings, nearest, parse_settings, read_yaml, shipped

Geometry = Literal["pad", "crop"]
"""How a picture becomes square: padded on the centre (all of it is seen), or cropped to its centre."""


class TaskSpec(Settings):
    """One task: a training file, an evaluation file, and how its answers are generated and judged."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """Name of the task in tables and folder names, e.g. `scienceqa`."""
    train: str
    """Training rows, relative to the instruction folder, e.g. `ScienceQA/train.json`."""
    evaluate: str
    """Evaluation rows, relative to the instruction folder, e.g. `ScienceQA/test.json`."""
    scorer: str
    """Name of the scorer that judges the answers."""
    max_new_tokens: int = Field(gt=0)
    """Longest answer that is generated, in tokens."""
    annotations: str | None = None
    """File under `cl_dataset/` with what the evaluation rows lack: choices (ScienceQA), ten answers (TextVQA)."""
    geometry: Geometry = "pad"
    """How a picture becomes square before the image processor sees it."""


class TaskSequence(Settings):
    """Tasks in the order in which they are learned."""

    name: str = Field(min_length=1)
    """Name of the sequence in reports."""
    tasks: tuple[TaskSpec, ...]
    """The tasks, at least one; no name occurs twice."""

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
        document = {"name": self.name, "tasks": [by_name[name] for name in names]}
        return parse_settings(TaskSequence, document, source=f"sequence {self.name}")


def load_sequence(name_or_path: str | Path) -> TaskSequence:
    """Read a task sequence: a YAML file, or the bare name of one that ships in `data_configs/`.

    A relative path that is not found from here is looked for among the shipped files, so that a recipe may say
    `data_configs/pocket.yaml` wherever it is started.

    Raises:
        RecipeError: unknown name, unreadable file, unknown key, bad value, or a task name that occurs twice.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        folder = shipped("data_configs")
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        if str(name_or_path) not in known:
            hint = f"did you mean {nearest(str(name_or_path), known)}?" if known else f"{folder} holds none"
            raise RecipeError(f"unknown task sequence {name_or_path}; {hint}")
        path = folder / f"{name_or_path}.yaml"
    elif not path.is_file() and shipped(str(path)).is_file():
        path = shipped(str(path))
    return parse_settings(TaskSequence, read_yaml(path), source=str(path))
