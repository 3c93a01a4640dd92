"""JSON whose every object has a key once, whose numbers are numbers, and whose text can be written down.

Python's reader keeps the last of two equal keys, takes `NaN`, and makes text of half a surrogate pair, silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from llava_cmoe.settings.base import shown

LONGEST_PLACE = 100
"""Characters of where something stands that an error repeats."""


class PlainJsonError(ValueError):
    """A document that is JSON and cannot be used; the message names the place and the fix, in one line."""


def parse_json(text: str | bytes) -> Any:
    """A document.

    Raises:
        PlainJsonError: an object has a key twice, a number or a nesting has no end, text is no text.
        json.JSONDecodeError: not JSON.
        UnicodeDecodeError: bytes that are no text.
    """
    if isinstance(text, bytes):
        text = text.decode()
    try:
        document = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise PlainJsonError("nested too deep for a reader") from error
    except (json.JSONDecodeError, PlainJsonError):
        raise
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
        raise PlainJsonError("a number of thousands of digits; write the one that is meant") from error
    if re.search(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]", text) and (place := next(_halves(document, ""), None)):
        where = place if len(place) <= LONGEST_PLACE else f"{place[:LONGEST_PLACE]}..."
        raise PlainJsonError(f"half of a surrogate pair in {where}, which no file can hold; write the whole character")
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    first: dict[str, int] = {}
    for place, (key, _) in enumerate(pairs):
        if first.setdefault(key, place) != place:
            row_id = found.get("question_id", found.get("id"))
            named = "one object" if row_id is None else f"the object with id {shown(row_id)}"
            raise PlainJsonError(
                f"key {shown(key)} occurs twice in {named}, as its entries {first[key]} and {place}; keep one of them"
            )
    raise AssertionError("fewer keys than pairs, and none twice")


def _refuse_constant(name: str) -> NoReturn:
    raise PlainJsonError(f"{name} is no number of JSON; write the number that is meant, or null")


def _halves(value: Any, place: str) -> Iterator[str]:
    """Where text, or the name of a key, cannot be written down."""
    if isinstance(value, str):
        if re.search("[\ud800-\udfff]", value):
            yield place or "the document"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _halves(key, f"{place}.{shown(key)}")
            yield from _halves(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _halves(inner, f"{place}[{index}]")
