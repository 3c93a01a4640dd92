"""What a run folder truly consists of, by name, and whether all of that is what was written.

Logs, checkpoints inside a stage, reports and locks belong to the machine where they were made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from llava_cmoe.registry.schema import RegistryError, TaskRecord
from llava_cmoe.registry.store import Registry

MEASURED = r"(results\.json|manifest\.json|answers/after_\d{2,}/[^/*?\[\]]+\.(located|oracle|random)\.jsonl)"
PARTS = re.compile(
    r"run\.json"
    r"|tasks/\d{2,}_[A-Za-z0-9_-]+/(record\.json|[A-Za-z0-9_-]+\.safetensors)"
    r"|merges/\d{2,}/merge\.json"
    rf"|{MEASURED}|subsets/[A-Za-z0-9_]+/{MEASURED}"
)
"""Paths from the run folder, with `/` between; only tensors, JSON, and JSON lines of answers."""


def parts_among(paths: Iterable[str]) -> list[str]:
    """Those of some paths that are parts of a run, sorted."""
    return sorted(path for path in paths if PARTS.fullmatch(path))


def parts_of(run: Path) -> list[str]:
    """Paths, from the run folder, of all that it consists of."""
    return parts_among(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())


def verify(run: Path) -> tuple[TaskRecord, ...]:
    """Read all of a run's tensors and records as restoring them would, without a model.

    Raises:
        RegistryError: nothing is learned, a link leaves the folder, or the first file that is not what was written.
    """
    registry = Registry(run)
    registry.recipe()
    records = registry.records()
    if not records:
        raise RegistryError(f"{run}: nothing is learned yet; train the run first")
    for record in records:
        registry.tensors_of(record)
    return records
