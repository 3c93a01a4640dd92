"""Tensors that are numbers: what is written once and never changed again is looked at before, and when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llava_cmoe.registry.schema import RegistryError

REMEDY = (
    "delete {name}, if it is there, and what follows; then learn it again with a lower learning rate or in bfloat16"
)


def check_finite(groups: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Stop where a task's tensors hold nan or inf.

    Args:
        groups: file stem to named tensors.
        folder: the task's directory, for the error.

    Raises:
        RegistryError: names the first such tensor.
    """
    for group, tensors in groups.items():
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise RegistryError(f"{folder}: {name} of {group} is not finite; {REMEDY.format(name=folder.name)}")
