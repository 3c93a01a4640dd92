"""What a setting may hold whatever it means: numbers that are numbers, no larger than can be; paths that name a place.

Bounds of a single setting stand beside it. Here are those of a kind, wherever a setting of that name stands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from llava_cmoe.settings.names import writable

LARGEST = 2**31 - 1
"""Of numbers: libraries below this one count in 32 bits, and no rate, share or factor is anywhere near."""

SIZES: Mapping[str, int] = {
    **dict.fromkeys(("rank", "condition_rank", "hidden", "latent"), 65_536),
    **dict.fromkeys(("num_first", "num_experts", "num_new", "max_new_experts", "num_classes", "top_k"), 4_096),
    **dict.fromkeys(("max_new_tokens", "max_length"), 2**22),
    **dict.fromkeys(("epochs", "recovery_epochs"), 100_000),
}
"""Name of a setting that sizes tensors, or says how long a stage takes, to the most that is taken for meant."""

MOST_PROCESSES = max(16, 4 * (os.cpu_count() or 1))
"""Helpers that a call may start here: four a core, as some wait for a disk."""


def check_given(annotation: Any, value: Any) -> None:
    """Look at a value as it was written, before it is made what the setting holds.

    Raises:
        ValueError: `true` or `false` where a number is wanted, anything else where they are, or a path that is empty or
            that no file system holds.
    """
    kinds = set(_kinds(annotation))
    if kinds & {int, float} and not kinds & {bool, Any}:
        for one in _scalars(value):
            if isinstance(one, bool):
                raise ValueError(f"a number is expected, `{str(one).lower()}` is none")
    if bool in kinds and not isinstance(value, bool):
        raise ValueError("true or false is expected")
    is_missing = value is None and type(None) not in kinds
    if Path in kinds and (isinstance(value, str) or is_missing):
        if is_missing or not value.strip():
            raise ValueError("a path is expected, and this one is empty; name a file or folder, or leave the key out")
        for part in Path(value).parts:
            writable(part)


def check_made(name: str, value: Any) -> None:
    """Look at what a setting holds.

    Raises:
        ValueError: a number that is too large.
    """
    most = SIZES.get(name, LARGEST)
    for one in _scalars(value):
        if isinstance(one, (int, float)) and abs(one) > most:
            raise ValueError(f"at most {most:,} is possible")


def _kinds(annotation: Any) -> Iterator[Any]:
    """All types that an annotation names."""
    inner = get_args(annotation)
    yield annotation
    for one in inner:
        yield from _kinds(one)


def _scalars(value: Any) -> Iterator[Any]:
    """A value, or those in a list; groups of settings are looked at on their own."""
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _scalars(one)
    elif not isinstance(value, Mapping):
        yield value
