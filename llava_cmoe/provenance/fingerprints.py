"""One name for the bytes of a set of files, so that data, backbone and learned tensors can be told apart by content.

Which files count is decided by the caller; what is done about a mismatch too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path


def fingerprint_file(path: Path) -> str:
    """Sha256 of one file in hex, read as a stream (weights may be larger than the memory)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint_each(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Name (relative to `root`) to sha256 of each file, in the names' order."""
    names = sorted({path.relative_to(root).as_posix() for path in paths})
    return {name: fingerprint_file(root / name) for name in names}


def fingerprint_all(files: Mapping[str, str]) -> str:
    """One sha256 over what `fingerprint_each` gives."""
    lines = (f"{sha256}  {name}\n" for name, sha256 in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprint_files(paths: Iterable[Path], root: Path) -> str:
    """Sha256 over names (relative to `root`) and contents of files, whatever their order and wherever `root` lies."""
    return fingerprint_all(fingerprint_each(paths, root))
