"""The file operations of a process on one folder: counted, and at a chosen one it dies, loses power, or is refused.

What a power cut leaves is that of a file system with a journal, at its worst: names (creations, renames, deletions)
survive in the order in which they were made, all up to the last `fsync` and any number of those after it; of a file
that was not synced since it was written any beginning survives, or zeros, or what was synced before.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Kept:
    """A file as it was seen: its inode, permissions, bytes, and the bytes that were synced last, if any."""

    inode: int
    mode: int
    content: bytes
    durable: bytes | None


Names = dict[str, Kept | None]
"""What a folder holds by path, None for a folder in it."""


class Disk:
    """Watches a process's operations on a folder; made in a process of its own, as nothing takes the watch back."""

    def __init__(self, root: Path, at: int = 0, then: Callable[[Disk, str], None] = lambda *_: None) -> None:
        """At operation `at`, from 1, and at each later one, `then` is called with what is about to be done."""
        self.root, self.count, self.last_sync = Path(os.path.realpath(root)), 0, 0
        self.history: list[Names] = []
        self._at, self._then = at, then
        self._busy, self._follows = False, False
        self._read: dict[tuple[int, int, int], bytes] = {}
        self._fsync = os.fsync
        os.fsync = self._synced
        sys.addaudithook(self._heard)

    def follow(self) -> None:
        """Keep what the folder holds before every operation, for `lose_power`."""
        self._follows = True

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if self._busy or not (event == "open" or event in CHANGING):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
            return
        folder = next((one for one in args[1:] if isinstance(one, int) and one >= 0), -1) if event != "open" else -1
        self._operation(event, args[0], folder)

    def _synced(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        if self._inside(path) and not self._busy:
            self._operation("fsync", path, -1)
        self._fsync(number)
        if self._inside(path) and self._follows and not self._busy:
            self._settle(os.fstat(number).st_ino)

    def _operation(self, event: str, path: Any, folder: int) -> None:
        if isinstance(path, int) or path is None:
            return
        place = os.fsdecode(path)
        if not os.path.isabs(place):
            above = os.readlink(f"/proc/self/fd/{folder}") if event != "os.mkdir" and folder > 2 else os.getcwd()
            place = os.path.join(above, place)
        if not self._inside(place) or _is_idle(event, place):
            return
        self._busy = True
        try:
            self.count += 1
            if self._follows:
                self.history.append(self._look())
            if self._at and self.count >= self._at:
                self._then(self, f"{event} {os.path.relpath(place, self.root)}")
        finally:
            self._busy = False

    def _inside(self, path: str) -> bool:
        """Whether a path is in the folder, and no tracker's: those are never read again."""
        inner = os.path.relpath(os.path.realpath(path), self.root)
        return inner.split(os.sep)[0] not in ("..", "logs")

    def _look(self) -> Names:
        before = {kept.inode: kept.durable for kept in (self.history[-1] if self.history else {}).values() if kept}
        found: Names = {}
        for place, folders, files in os.walk(self.root):
            found.update({os.path.relpath(os.path.join(place, name), self.root): None for name in folders})
            for name in files:
                path = os.path.join(place, name)
                seen = os.stat(path)
                key = (seen.st_ino, seen.st_mtime_ns, seen.st_size)
                if key not in self._read:
                    self._read[key] = Path(path).read_bytes()
                inode, mode = seen.st_ino, stat.S_IMODE(seen.st_mode)
                found[os.path.relpath(path, self.root)] = Kept(inode, mode, self._read[key], before.get(inode))
        return found

    def _settle(self, inode: int) -> None:
        """A sync: the names so far are on the disk, and so are the bytes of one file."""
        self._busy = True
        names = self._look()
        for path, kept in names.items():
            if kept is not None and kept.inode == inode:
                names[path] = Kept(kept.inode, kept.mode, kept.content, kept.content)
        self.last_sync = len(self.history)
        self.history.append(names)
        self._busy = False

    def lose_power(self, rng: random.Random) -> None:
        """Leave in the folder what a power cut might, and die."""
        self._busy = True
        names = self.history[rng.randint(self.last_sync, len(self.history) - 1)]
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, kept in names.items():
            path = self.root / name
            if kept is None:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_survives(kept, rng))
            path.chmod(kept.mode)
        die()


def _is_idle(event: str, path: str) -> bool:
    """Whether an operation changes nothing: making a folder that is there, deleting a file that is not."""
    return os.path.lexists(path) if event == "os.mkdir" else event == "os.remove" and not os.path.lexists(path)


def _survives(kept: Kept, rng: random.Random) -> bytes:
    if kept.durable == kept.content:
        return kept.content
    part = kept.content[: rng.randrange(len(kept.content) + 1)]
    return rng.choice([b"" if kept.durable is None else kept.durable, b"", part, bytes(len(kept.content))])


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(number: int) -> Callable[[Disk, str], None]:
    """What makes every operation that needs room (ENOSPC, EDQUOT) or changes anything (others) fail."""

    def refusing(disk: Disk, operation: str) -> None:
        needs_room = operation.split(" ")[0] in ("open", "fsync", "os.mkdir")
        if needs_room or number not in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(number, os.strerror(number), str(disk.root / operation.split(" ", 1)[1]))

    return refusing
