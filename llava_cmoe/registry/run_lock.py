"""One process at a time writes to a run folder; the operating system forgets a lock with the process that held it.

A lock of a record (`fcntl.lockf`): unlike `flock`, a data loader's workers do not inherit it, so that a killed run can
go on at once, and it holds on network drives. It belongs to the process, which may open the folder several times.
Readers take none: what they read is renamed into place.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary, finalize

from llava_cmoe.registry.inside import check_inside
from llava_cmoe.registry.schema import RegistryError

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""File in the run folder; stays there, empty."""


class RunLock:
    """Holds a run folder for as long as the object lives."""

    def __init__(self, run: Path, descriptor: int) -> None:
        """`descriptor` is of the locked file."""
        self.run = run
        finalize(self, os.close, descriptor)


_held: WeakValueDictionary[Path, RunLock] = WeakValueDictionary()


def hold(run: Path) -> RunLock:
    """Become the one that writes to a run folder.

    Raises:
        RegistryError: another process is; names the way on. Or a link leaves the folder, where a lock might be made.
    """
    check_inside(run)
    place = run.resolve()
    if (mine := _held.get(place)) is not None:
        return mine
    descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            raise RegistryError(
                f"{run}: another process is writing to this run and holds its {LOCK}; wait until it ends, or choose "
                "another folder with run=..."
            ) from error
        logger.warning("%s: cannot be locked here (%s); let no second process write to it", run, error.strerror)
    _held[place] = lock = RunLock(place, descriptor)
    return lock


def make_and_hold(run: Path) -> RunLock:
    """The same for a folder that may be missing."""
    run.mkdir(parents=True, exist_ok=True)
    return hold(run)


@contextmanager
def writing(run: Path, main: bool = True) -> Iterator[None]:
    """Hold a run folder inside, if there is one, in the main process of a launch; errors of `hold`."""
    lock = hold(run) if main and run.is_dir() else None
    yield
    del lock
