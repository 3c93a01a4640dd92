"""Ways to damage a file, each decided by a random number generator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = Callable[[Path, Path, random.Random], str | None]
"""Damages a file, given the same file of another run; returns how, or None where it cannot."""

OTHER: tuple[Any, ...] = (None, True, False, 0, 1, -1, 9999, 0.5, 320.0, "", "other", "bfloat16", [], {}, ["x"])


def flipped(path: Path, other: Path, rng: random.Random) -> str | None:
    """One bit."""
    content = bytearray(path.read_bytes())
    if not content:
        return None
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    content[at] ^= 1 << bit
    _write(path, bytes(content))
    return f"bit {bit} of byte {at}"


def cut(path: Path, other: Path, rng: random.Random) -> str | None:
    """Truncated somewhere."""
    content = path.read_bytes()
    if not content:
        return None
    length = rng.randrange(len(content))
    _write(path, content[:length])
    return f"cut to {length} of {len(content)} bytes"


def emptied(path: Path, other: Path, rng: random.Random) -> str | None:
    """Nothing in it."""
    if not path.stat().st_size:
        return None
    _write(path, b"")
    return "emptied"


def zeroed(path: Path, other: Path, rng: random.Random) -> str | None:
    """As long as before, of zeros."""
    if not path.stat().st_size:
        return None
    _write(path, bytes(path.stat().st_size))
    return "zeros"


def deleted(path: Path, other: Path, rng: random.Random) -> str | None:
    """Gone."""
    path.unlink()
    return "deleted"


def swapped(path: Path, other: Path, rng: random.Random) -> str | None:
    """That of another run, which learned the same from another seed."""
    if not other.is_file() or other.read_bytes() == path.read_bytes():
        return None
    _write(path, other.read_bytes())
    return "of another run"


def edited(path: Path, other: Path, rng: random.Random) -> str | None:
    """One value of a JSON file, or of a line of one, is another, a key is gone or there is one more."""
    if path.suffix not in (".json", ".jsonl"):
        return None
    text = path.read_text()
    lines = text.splitlines(keepends=True) if path.suffix == ".jsonl" else [text]
    at = rng.randrange(len(lines))
    document = json.loads(lines[at])
    how = edit(document, rng)
    changed = json.dumps(document, indent=None if path.suffix == ".jsonl" else 1)
    lines[at] = changed + "\n"
    _write(path, "".join(lines).encode())
    return how


def edit(document: Any, rng: random.Random) -> str:
    """Change one value of a document in place; returns where, and to what."""
    *outer, key = rng.choice([place for place in places(document) if place])
    inner = document
    for step in outer:
        inner = inner[step]
    place = ".".join(map(str, (*outer, key)))
    match rng.randrange(6):
        case 0 if isinstance(inner, dict):
            del inner[key]
            return f"{place} is gone"
        case 1 if isinstance(inner, dict):
            inner["of_nobody"] = 1
            return f"a key more beside {place}"
        case _:
            value = rng.choice([one for one in OTHER if json.dumps(one) != json.dumps(inner[key])])
            inner[key] = value
            return f"{place} is {value!r}"


def places(document: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a document stand, inner ones included."""
    yield place
    if isinstance(document, (dict, list)):
        for key in document.keys() if isinstance(document, dict) else range(len(document)):
            yield from places(document[key], (*place, key))


def _write(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


KINDS: dict[str, Damage] = {
    "bit flipped": flipped,
    "cut": cut,
    "emptied": emptied,
    "zeroed": zeroed,
    "deleted": deleted,
    "of another run": swapped,
    "value edited": edited,
}
