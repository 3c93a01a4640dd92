"""Names that files bring along, of a run, a task, a file beside a record: none of them leads out of its folder."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated

from pydantic import AfterValidator

LONGEST = 255
"""Bytes of a file's name on common file systems."""


def plain_name(name: str) -> str:
    """The name, which may be that of one file or folder.

    Raises:
        ValueError: it has several parts, is too long, or holds what no name should show or can hold.
    """
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError("a name is expected, not a path; leave out slashes and dots that lead elsewhere")
    return writable(name)


def inner_path(path: str) -> str:
    """The path, which stays below the folder that it starts from.

    Raises:
        ValueError: it is absolute, climbs, or holds what no name can hold.
    """
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor or ".." in PureWindowsPath(path).parts:
        raise ValueError("a path below its folder is expected; leave out a leading slash and every `..`")
    for part in PurePosixPath(path).parts:
        writable(part)
    return path


def writable(name: str) -> str:
    """The name, which a file system can hold and a terminal can show; raises ValueError for another."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise ValueError("a name holds no control characters and no half of a surrogate pair; choose another one")
    if len(name.encode()) > LONGEST:
        raise ValueError(f"a name has at most {LONGEST} bytes, this one has {len(name.encode())}; shorten it")
    return name


PlainName = Annotated[str, AfterValidator(plain_name)]
"""Names one file or folder."""
InnerPath = Annotated[str, AfterValidator(inner_path)]
"""Leads from a folder to what lies below it."""
