"""The safetensors files of a learned task: written once and synced, and read back only as they were written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_cmoe.provenance.files import sync, writing_tensors
from llava_cmoe.provenance.fingerprints import fingerprint_file
from llava_cmoe.registry.finite import check_finite
from llava_cmoe.registry.schema import SUFFIX, FileRecord, RegistryError
from llava_cmoe.settings.base import in_one_line


def write_tensors(folder: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, FileRecord]:
    """One synced file per group, and what goes on record of each; equal tensors give equal bytes."""
    written = {}
    for group, tensors in groups.items():
        path = folder / f"{group}{SUFFIX}"
        # A copy of its own for each: safetensors refuses views of one storage, which slices of a stacked bank are.
        copies = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
        with writing_tensors(path):
            save_file(copies, path)
        sync(path)
        written[path.name] = _describe(path)
    return written


def read_tensors(folder: Path, files: Mapping[str, FileRecord]) -> dict[str, dict[str, Tensor]]:
    """Named tensors by group, each file verified against its record.

    Raises:
        RegistryError: a file that is missing or not what was written, tensors that are not finite.
    """
    remedy = f"restore it from a copy, or delete {folder.name} and what follows to learn them again"
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            raise RegistryError(f"{path}: is missing; {remedy}")
        if _describe(path) != written:
            raise RegistryError(f"{path}: is damaged, its sha256 or size is not the one on record; {remedy}")
    groups = {}
    for name in files:
        try:
            groups[Path(name).stem] = load_file(folder / name)
        except (SafetensorError, ValueError) as error:  # of a record that names the hash of no tensors
            raise RegistryError(f"{folder / name}: holds no tensors ({in_one_line(error)}); {remedy}") from error
    check_finite(groups, folder)
    return groups


def _describe(path: Path) -> FileRecord:
    return FileRecord(sha256=fingerprint_file(path), bytes=path.stat().st_size)
