"""Reads task sequences from YAML: a file lists tasks, or takes those of another file in an order of its own.

    name: coin                          name: coin_reversed
    defaults: {images: cl_dataset}      tasks_of: coin
    tasks: [{name: gqa, ...}, ...]      order: [ocrvqa, vqav2, ...]

The keys are told in `data_configs/README.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from llava_cmoe.data.tasks import Source, TaskSequence, TaskSpec
from llava_cmoe.settings.base import RecipeError, Settings
from llava_cmoe.settings.recipes import nearest, parse_settings, read_yaml, shipped


class SequenceFile(Settings):
    """What a sequence's YAML file may say; the tasks themselves are checked once they are put together."""

    name: str = Field(min_length=1)
    """Name of the sequence in reports."""
    tasks: tuple[dict[str, Any], ...] = ()
    """The tasks, in the order in which they are learned."""
    defaults: dict[str, Any] = Field(default_factory=dict)
    """Keys of every task here that does not say otherwise."""
    tasks_of: str | None = None
    """Instead of tasks: the name or path of another sequence, whose tasks and sources are taken over."""
    order: tuple[str, ...] | None = None
    """Which of those tasks, by name, in this order; all, as they come, when absent."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Keys that become the same for all of those tasks; null takes a key back."""
    sources: tuple[Source, ...] | None = None
    """Where the data comes from."""

    @model_validator(mode="after")
    def _own_tasks_or_another_files(self) -> Self:
        if (self.tasks_of is None) == (not self.tasks):
            raise ValueError("a sequence lists its `tasks`, or takes those of another file (`tasks_of`); give one")
        unused = [key for key in ("order", "changes") if getattr(self, key)] if self.tasks else []
        if self.tasks_of is not None and self.defaults:
            unused = ["defaults"]
        if unused:
            wanted = "`tasks_of`" if self.tasks else "`tasks`"
            raise ValueError(f"{unused[0]} says something of {wanted}, which this file does not have")
        for group in ("defaults", "changes"):
            for key in getattr(self, group):
                if key not in TaskSpec.model_fields or key == "name":
                    known = nearest(key, TaskSpec.model_fields)
                    raise ValueError(f"unknown key {group}.{key}; did you mean {group}.{known}?")
        return self


def load_sequence(name_or_path: str | Path) -> TaskSequence:
    """Read a task sequence: a YAML file, or the bare name of one that ships in `data_configs/`.

    A relative path that is not found from here is looked for among the shipped files, so that a recipe may say
    `data_configs/pocket.yaml` wherever it is started.

    Raises:
        RecipeError: unknown name, unreadable file, unknown key, bad value, or a task name that occurs twice.
    """
    return _load(_path(name_or_path), before=())


def _load(path: Path, before: tuple[Path, ...]) -> TaskSequence:
    if path in before:
        raise RecipeError(f"{path}: takes its tasks from itself, by way of {', '.join(map(str, before))}")
    file = parse_settings(SequenceFile, read_yaml(path), source=str(path))
    document: dict[str, Any] = {"name": file.name}
    if file.tasks_of is None:
        document |= {"tasks": [file.defaults | task for task in file.tasks], "sources": file.sources or ()}
        return parse_settings(TaskSequence, document, source=str(path))
    base = _load(_path(file.tasks_of, beside=path.parent), before=(*before, path))
    try:
        tasks = base.select(file.order).tasks if file.order else base.tasks
    except RecipeError as error:
        raise RecipeError(f"{path}: order: {error}") from error
    document["tasks"] = [_changed(task, file.changes) for task in tasks]
    document["sources"] = base.sources if file.sources is None else file.sources
    return parse_settings(TaskSequence, document, source=str(path))


def _changed(task: TaskSpec, changes: Mapping[str, Any]) -> dict[str, Any]:
    keys = {key: value for key, value in dict(task).items() if key in task.model_fields_set}
    return {key: value for key, value in {**keys, **changes}.items() if value is not None}


def _path(name_or_path: str | Path, beside: Path | None = None) -> Path:
    """The file that a name or path means; a relative path may also start `beside` the file that says it."""
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        folder = shipped("data_configs")
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        if str(name_or_path) not in known:
            raise RecipeError(f"unknown task sequence {name_or_path}; {_hint(str(name_or_path), known, folder)}")
        return folder / f"{name_or_path}.yaml"
    places = [path, shipped(str(path))] if beside is None else [beside / path, path, shipped(str(path))]
    return next((place for place in places if place.is_file()), path)


def _hint(name: str, known: Iterable[str], folder: Path) -> str:
    names = list(known)
    return f"did you mean {nearest(name, names)}?" if names else f"{folder} holds none"
