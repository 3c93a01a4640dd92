"""A run as a report needs it: its results and, where they are at hand, its questions and the use of its probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from llava_cmoe.evaluation.log import Results
from llava_cmoe.evaluation.rescoring import Examined, open_examined, results_of
from llava_cmoe.registry.schema import RegistryError, TaskRecord
from llava_cmoe.registry.store import Registry
from llava_cmoe.report.paired_tests import run_names


@dataclass(frozen=True)
class Reported:
    """One run of a report.

    Attributes:
        name: of its folder, or the path where two folders have one name.
        folder: where it lies.
        results: what was measured.
        examined: the questions; None where the data is not at hand.
        notes: what is not at hand, a sentence each.
        probe_use: task to site to the share of a token's slots that a probe got; absent where none was probed.
    """

    name: str
    folder: Path
    results: Results
    examined: Examined | None = None
    notes: tuple[str, ...] = ()
    probe_use: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def open_reported(folders: Sequence[Path], root: Path | None = None) -> list[Reported]:
    """Read finished runs; what else than results is missing becomes a note.

    Args:
        folders: with `results.json`.
        root: the data root, where it is not the one that the results name.

    Raises:
        RegistryError: no results, or a folder that is given twice.
    """
    return [_open(name, folder, root) for name, folder in zip(run_names(folders), folders, strict=True)]


def _open(name: str, folder: Path, root: Path | None) -> Reported:
    results, examined, notes = results_of(folder), None, list[str]()
    probe_use: dict[str, dict[str, float]] = {}
    try:
        examined = open_examined(folder, root)
    except (RegistryError, ValueError, OSError) as error:
        notes.append(
            f"{name}: no pictures, and nothing is said of single answers, as the questions are missing: {error}"
        )
    try:
        probe_use = {record.name: _probe_use(record) for record in Registry(folder).records()}
    except (RegistryError, ValueError, TypeError, AttributeError, OSError) as error:  # facts are plain JSON, as read
        notes.append(f"{name}: no use of probes: {error}")
    return Reported(name, folder, results, examined, tuple(notes), probe_use)


def _probe_use(record: TaskRecord) -> dict[str, float]:
    """Mean over a site's probes, which are its last experts; empty for a method that does not probe."""
    frequencies = record.facts.get("growth", {}).get("frequencies", {})
    num_probes = record.settings.get("method", {}).get("probe", {}).get("max_new_experts", 1)
    return {site: fmean(used[-num_probes:]) for site, used in frequencies.items()}
