"""Files that are whole or not there: written beside, synced, renamed into place."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, and the folders above it where they are missing, so that half of it is never seen.

    Several processes may write the same one at a time; the last one's stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    with unfinished.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(path)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk: a rename must not overtake what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
