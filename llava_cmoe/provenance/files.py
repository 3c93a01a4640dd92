"""Files that are whole or not there: written beside, synced, renamed into place."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

UNFINISHED = re.compile(r"\..+\.([1-9][0-9]*)\.unfinished")
"""What a writer names a file until it is whole: the file's name and the writer's process."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, and the folders above it where they are missing, so that half of it is never seen.

    Several processes may write the same one at a time; the last one's stays. What killed writers left in the folder is
    removed.

    Raises:
        OSError: it cannot be written; also where a device or a pipe stands, in whose place the file would come.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(
            errno.EINVAL, "is a device or a pipe, which a file would take the place of; name a file", str(path)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(path.parent)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        _write_beside(unfinished, path, content)
    except FileNotFoundError:  # another machine took this process for a dead one of its own
        _write_beside(unfinished, path, content)
    finally:
        unfinished.unlink(missing_ok=True)  # only where an error kept it from its place


def _write_beside(unfinished: Path, path: Path, content: bytes) -> None:
    with unfinished.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(path)


def _remove_unfinished(folder: Path) -> None:
    for left in folder.glob(".*.unfinished"):
        found = UNFINISHED.fullmatch(left.name)
        if found and left.is_file() and not _lives(int(found[1])):
            left.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextmanager
def writing_tensors(place: Path) -> Iterator[None]:
    """Let what safetensors and torch raise of their own where a file cannot be written be the system's error.

    Raises:
        OSError: names the place; with the system's number where it is told.
    """
    try:
        yield
    except SafetensorError as error:
        if (told := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(place)) from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(errno.EIO, "cannot be written, as where a disk is full", str(place)) from error


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk: a rename must not overtake what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
