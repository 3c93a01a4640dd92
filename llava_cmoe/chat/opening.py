"""Loads runs so that they can answer: as they are, as they were after some stages, or as one of their merges has them.

Several of them share the weights of one backbone: each has a module tree of its own around the same tensors, which no
method writes to. What one more costs is the experts, routers and locators of its stages, not another backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_cmoe.backbones.loading import Backbone, load_backbone, sharing_weights
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
from llava_cmoe.settings.run import Recipe


@dataclass(frozen=True)
class Snapshot:
    """A run as it is now, as it was after its first `after` stages, or as its merge `merge` makes it."""

    run: Path
    after: int | None = None
    merge: int | None = None


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


@dataclass(frozen=True)
class _Checked:
    """What is known of a snapshot before any weights are read."""

    snapshot: Snapshot
    registry: Registry
    recipe: Recipe
    names: Sequence[str]
    geometries: Sequence[Geometry]
    fingerprints: frozenset[str]


def open_learned(run: Path, after: int | None = None, merge: int | None = None) -> LearnedRun:
    """Load a run as it is now, or as it was after its first `after` stages, or as its merge `merge` makes it.

    Raises:
        RegistryError: no run in this folder, fewer stages are learned, no such merge, or a file is damaged.
        RecipeError: tasks of the run square pictures differently, and nothing says which task a question is of.
    """
    [learned] = open_together([Snapshot(run, after, merge)])
    return learned


def open_together(snapshots: Sequence[Snapshot]) -> list[LearnedRun]:
    """Load several, all on one backbone; everything that needs no weights is checked first.

    Raises:
        RegistryError: as `open_learned`.
        RecipeError: as `open_learned`, or they were learned on different backbones.
    """
    checked = [_check(snapshot) for snapshot in snapshots]
    for other in checked[1:]:
        _check_same_backbone(checked[0], other)
    backbone = load_backbone(checked[0].recipe.backbone)
    backbone.model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    backbones = [backbone, *(sharing_weights(backbone) for _ in checked[1:])]  # before a method edits the first one
    return [_restore(one, backbone) for one, backbone in zip(checked, backbones, strict=True)]


def _check(snapshot: Snapshot) -> _Checked:
    run, after, merge = snapshot.run, snapshot.after, snapshot.merge
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
    fingerprints = frozenset(record.backbone_fingerprint for record in records)
    return _Checked(snapshot, registry, recipe, names, geometries, fingerprints)


def _check_same_backbone(one: _Checked, other: _Checked) -> None:
    """A path may differ, what lies there may not; nor may how it is loaded."""
    settings = [checked.recipe.backbone.model_dump(exclude={"path"}) for checked in (one, other)]
    differing = sorted(f"backbone.{key}" for key, value in settings[0].items() if settings[1][key] != value)
    if len(one.fingerprints | other.fingerprints) > 1:
        differing.insert(0, "the files of backbone.path")
    if differing:
        raise RecipeError(
            f"{other.snapshot.run}: was learned on another backbone than {one.snapshot.run} ({', '.join(differing)}); "
            "answers are compared on one backbone, name a run that was learned on the same"
        )


def _restore(checked: _Checked, backbone: Backbone) -> LearnedRun:
    recipe, snapshot = checked.recipe, checked.snapshot
    method = restore_method(recipe, backbone, checked.registry, snapshot.after)
    if snapshot.merge is not None:
        restore_merge(method, checked.registry, snapshot.merge)
    return LearnedRun(method, backbone, checked.names, checked.geometries, recipe.data.max_pixels)


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
