"""JSON in which no object has a key twice: Python's reader keeps the last of them and says nothing."""

from __future__ import annotations

import json
from typing import Any


class DoubledKey(ValueError):
    """An object with a key that occurs twice; the message names the key and both places."""


def parse_json(text: str) -> Any:
    """A document.

    Raises:
        DoubledKey: an object has a key twice.
        json.JSONDecodeError: not JSON.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    first: dict[str, int] = {}
    for place, (key, _) in enumerate(pairs):
        if first.setdefault(key, place) != place:
            row_id = found.get("question_id", found.get("id"))
            named = "one object" if row_id is None else f"the object with id {row_id!r}"
            raise DoubledKey(
                f"key {key!r} occurs twice in {named}, as its entries {first[key]} and {place}; keep one of them"
            )
    raise AssertionError("fewer keys than pairs, and none twice")
