"""Loads a run so that it can answer: as it is, as it was after some stages, or as one of its merges makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_cmoe.backbones.loading import Backbone, load_backbone
from llava_cmoe.data.images import open_image, side_of_square
from llava_cmoe.data.task_data import sequence_of
from llava_cmoe.data.tasks import Geometry
from llava_cmoe.merging.store import Merges, restore_merge
from llava_cmoe.methods import method_of
from llava_cmoe.methods.base import Method
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.base import RecipeError


@dataclass(frozen=True)
class LearnedRun:
    """A run that can answer.

    Attributes:
        method: with every known task restored, on the backbone, where the machine computes best.
        backbone: the one that the method sits on.
        names: of the known tasks, in the order in which they were learned.
        geometries: how pictures became square while each task was learned.
        max_pixels: largest picture while learning; any when None.
    """

    method: Method
    backbone: Backbone
    names: Sequence[str]
    geometries: Sequence[Geometry]
    max_pixels: int | None


def open_learned(run: Path, after: int | None = None, merge: int | None = None) -> LearnedRun:
    """Load a run as it is now, or as it was after its first `after` stages, or as its merge `merge` makes it.

    Raises:
        RegistryError: no run in this folder, fewer stages are learned, no such merge, or a file is damaged.
        RecipeError: tasks of the run square pictures differently, and nothing says which task a question is of.
    """
    registry = Registry(run)
    recipe, records = registry.recipe(), registry.records()
    if after is not None and after > len(records):
        raise RegistryError(f"{run}: {len(records)} stages are learned, not {after}")
    if merge is not None:
        if after is not None and after < len(records):
            raise RegistryError(f"{run}: merge {merge} is of all {len(records)} learned stages; leave out --after")
        Merges(registry).load(merge)
    names = [record.name for record in records[:after]]
    stages, tasks = method_of(recipe.method).stages(sequence_of(recipe.data).names), sequence_of(recipe.data).tasks
    geometries = [tasks[stage.after].geometry for stage in stages[: len(names)]] or [tasks[0].geometry]
    if len(set(geometries)) > 1 and not method_of(recipe.method).locates:
        raise RecipeError(
            f"{run}: its tasks square pictures differently ({', '.join(sorted(set(geometries)))}), and method "
            f"{recipe.method.name} does not find out which task a question is of; chat with a run of one geometry"
        )
    backbone = load_backbone(recipe.backbone)
    backbone.model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    method = restore_method(recipe, backbone, registry, after)
    if merge is not None:
        restore_merge(method, registry, merge)
    return LearnedRun(method, backbone, names, geometries, recipe.data.max_pixels)


def names_of(run: Path, after: int | None = None) -> Sequence[str]:
    """The tasks that a question can be told to be of, before a backbone is loaded: none where all are answered alike.

    Raises:
        RegistryError: no run in this folder.
    """
    registry = Registry(run)
    locates = method_of(registry.recipe().method).locates
    return [record.name for record in registry.records()[:after]] if locates else []


def check_picture(run: Path, image: Path) -> None:
    """Find what is wrong with a picture before a backbone is loaded.

    Raises:
        DataError: the picture is missing, broken or too large.
        RegistryError: no run in this folder.
    """
    open_image(image)
    data = Registry(run).recipe().data
    for geometry in {task.geometry for task in sequence_of(data).tasks}:
        side_of_square(image, geometry, data.max_pixels)
