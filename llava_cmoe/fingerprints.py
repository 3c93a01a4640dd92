"""One name for the bytes of a set of files, so that data, backbone and learned tensors can be told apart by content.

Which files count is decided by the caller; what is done about a mismatch too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def fingerprint_file(path: Path) -> str:
    """Sha256 of one file in hex, read as a stream (weights may be larger than the memory)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint_files(paths: Iterable[Path], root: Path) -> str:
    """Sha256 over names (relative to `root`) and contents of files, whatever their order and wherever `root` lies."""
    names = sorted({path.relative_to(root).as_posix() for path in paths})
    total = hashlib.sha256()
    for name in names:
        total.update(f"{fingerprint_file(root / name)}  {name}\n".encode())
    return total.hexdigest()
