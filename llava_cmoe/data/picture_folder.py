"""Finds the picture that a row names, inside the folder of pictures and nowhere else; opening it is `images.py`'s job.

Names are looked up once: published files ask a million questions about far fewer pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from llava_cmoe.data.problems import LostForGood, Unusable
from llava_cmoe.data.spelling import as_named
from llava_cmoe.settings.base import shown


class PictureFolder:
    """The pictures that a file's rows name, relative to one folder.

    Attributes:
        folder: as it is spelled in the data root; it may be a link.
        lost: names of pictures that nobody can get any more.
    """

    def __init__(self, folder: Path, lost: Iterable[str] = ()) -> None:
        self.folder = folder
        self.lost = frozenset(lost)
        self._target = Path(os.path.realpath(folder))
        self._found: dict[str, str] = {}
        self._spelled: dict[Path, dict[str, str]] = {}

    def path_of(self, name: object) -> str:
        """Absolute path of a picture, which exists and lies inside the folder.

        Raises:
            Unusable: the name is no path, leaves the folder, or nothing is there.
            LostForGood: nothing is there, and the name is among those lost.
        """
        if isinstance(name, str) and name in self._found:
            return self._found[name]
        if not isinstance(name, str) or not PurePosixPath(name).parts or "\0" in name:
            raise Unusable(f"image must be a path relative to {self.folder.name}/, found {shown(name)}")
        relative = PurePosixPath(name)
        if relative.parts[0] == self.folder.name:
            relative = relative.relative_to(self.folder.name)
        path = Path(os.path.realpath(self._target / relative))
        if relative.is_absolute() or not path.is_relative_to(self._target):
            # Absolute, through "..", or through a link; a link of the whole folder is fine.
            raise Unusable(
                f"image path {as_named(name)} leaves the root, for {as_named(str(path))}; write it relative to "
                f"{self.folder.name}/"
            )
        if not os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
            if str(relative) in self.lost:
                raise LostForGood(name)
            raise Unusable(self._why_missing(name, path))
        return self._found.setdefault(name, str(path))

    def _why_missing(self, name: str, path: Path) -> str:
        """A picture that is missing is one problem; so is its folder, though thousands of rows name it."""
        absent = path
        while absent != self._target and not os.path.isdir(absent.parent):
            absent = absent.parent
        alike = self._spelled_otherwise(absent)
        hint = f"; there is {alike}" if alike else ""
        if absent == path:
            return f"image file {as_named(name)} is missing (looked for {as_named(str(path))}){hint}"
        return f"image folder {as_named(str(self.folder / absent.relative_to(self._target)))} is missing{hint}"

    def _spelled_otherwise(self, absent: Path) -> str | None:
        """A name beside an absent one that differs only in case, signs or ending."""
        folder = absent.parent
        if folder not in self._spelled:
            names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            self._spelled[folder] = {_plain(name): name for name in names}
        return self._spelled[folder].get(_plain(absent.name))


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.partition(".")[0].casefold()))
