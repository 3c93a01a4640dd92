"""What a rendered pocket sequence says of itself, so that no run learns an older version, or another seed, unawares."""

from __future__ import annotations

import json
from pathlib import Path

from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.settings.plain_json import parse_json

NAME = "pocket.json"
VERSION = 2
"""Raised when the tasks are drawn otherwise."""


def mark_pocket(root: Path, seed: int) -> None:
    """Write down what a root was rendered with."""
    (root / NAME).write_text(json.dumps({"version": VERSION, "seed": seed}) + "\n")


def check_pocket(root: Path, seed: int) -> None:
    """Stop at a root that this version, with this seed, would not render.

    Raises:
        DataError: says what it is, and what to do.
    """
    path = root / NAME
    try:
        found = parse_json(path.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise DataError(
            Problem(root, "was rendered by an older version, with other questions; delete it to have it rendered anew")
        )
    if found.get("seed") != seed:
        reason = (
            f"was rendered from seed {found.get('seed')}, not {seed}; set data.pocket_seed, or name another data.root"
        )
        raise DataError(Problem(path, reason))
