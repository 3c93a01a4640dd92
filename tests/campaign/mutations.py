"""What people, programs and strangers do to a document: values of other kinds, keys too many, damaged text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from campaign.damage import places

TEXTS = (
    *("", " ", "\n", "\t\r\n", "\u200b", "\ufeff", "\0", "a\0b", "\x1b[2J", "a\rb", "a\u2028b", "\u202eabc", "\ud800"),
    *("x" * 5000, "<image>", "<image>\n", "<image><image>", "a <image>", "</s>", "<s>", "<pad>", "USER:", "[/b]"),
    *("[red]", "{{ 1/0 }}", "{% raw %}", "é\u0301", "😀", " a", "a ", "0", "-1", "1e400", "nan", "yes", "no", "A", "B"),
    *("../x", "/etc/passwd", "a/../../b", "~", ".", "..", "con", "a" * 300, "12:30:45", "2020-01-01", "0x10", "1_000"),
    *("[0, 0, 1, 1]", "[1, 1, 0, 0]", "[nan, 0, 1, 1]", "[0, 0, 1e-400, 1]", "http://example.invalid/x"),
)
NUMBERS = (
    *(0, -1, 1, 2, 2**31 - 1, 2**31, 2**63, 2**64, 10**20, 10**400, 0.5, -0.0, 1.0, 1e-320, 1e308),
    *(float("inf"), float("-inf"), float("nan")),
)
CONTENT_KEYS = ("video", "images2", "system_prompt", "tools", "transcript", "second_question", "audio", "reply")


def any_value(rng: random.Random) -> Any:
    """A value that may not belong where it is put."""
    match rng.randrange(10):
        case 0 | 1 | 2 | 3:
            return rng.choice(TEXTS)
        case 4 | 5:
            return rng.choice(NUMBERS)
        case 6:
            return rng.choice((True, False, None))
        case 7:
            return [rng.choice(TEXTS) for _ in range(rng.randrange(4))]
        case 8:
            return {rng.choice(TEXTS): rng.choice(TEXTS) for _ in range(rng.randrange(3))}
        case _:
            deep: Any = rng.choice(TEXTS)
            for _ in range(rng.choice((1, 20, 900))):
                deep = [deep]
            return deep


def mutated(document: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy of a document with one change, and which."""
    document = json.loads(json.dumps(document))
    *outer, key = rng.choice([place for place in places(document) if place])
    inner = document
    for step in outer:
        inner = inner[step]
    where = ".".join(map(str, (*outer, key)))
    match rng.randrange(8):
        case 0 if isinstance(inner, dict):
            del inner[key]
            return document, f"{where} gone"
        case 1 if isinstance(inner, dict):
            name = rng.choice((*CONTENT_KEYS, str(key) + "s", str(key).upper(), rng.choice(TEXTS)))
            inner[name] = any_value(rng)
            return document, f"{name[:40]!r} beside {where}"
        case 2 if isinstance(inner, list):
            inner.append(inner[key])
            return document, f"{where} twice"
        case 3 if isinstance(inner[key], str) and inner[key]:
            text, at = inner[key], rng.randrange(len(inner[key]))
            inner[key] = text[:at] + rng.choice(TEXTS)[:600] + text[at:]
            return document, f"text put into {where}"
        case _:
            value = any_value(rng)
            inner[key] = value
            return document, f"{where} another value"


def written(document: Any, rng: random.Random) -> bytes:
    """JSON of a document; lone surrogates and numbers without end as Python writes them."""
    return json.dumps(document, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def flip(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One bit."""
    changed, at = bytearray(content), rng.randrange(len(content))
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed), f"bit of byte {at}"


def cut(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The end is gone."""
    at = rng.randrange(len(content))
    return content[:at], f"cut at {at}"


def put_in(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bytes that mean something to some parser."""
    odd = rng.choice(
        (
            b"\xff",
            b"\0",
            b"\xef\xbb\xbf",
            b",",
            b"}",
            b'"',
            b"NaN",
            b"\\ud800",
            b"9" * 5000,
            b"[" * 3000,
            b"\r",
            b"&a *a",
        )
    )
    at = rng.randrange(len(content) + 1)
    return content[:at] + odd + content[at:], f"{odd[:10]!r} at {at}"


def doubled(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A part of the text twice, such as a key, a row or a line."""
    start = rng.randrange(len(content))
    part = content[start : start + rng.choice((1, 10, 60))]
    return content[:start] + part + content[start:], f"{len(part)} bytes at {start} twice"


def replaced(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """All of it is something else."""
    other = rng.choice(
        (b"", b"\n", b"null", b"[]", b"{}", b"3", b'"a"', b"[" * 50_000, b'{"a":' * 50_000, b"\x80\x04.")
    )
    return other, f"{other[:10]!r} instead"


TEXT_CHANGES: tuple[Callable[[bytes, random.Random], tuple[bytes, str]], ...] = (flip, cut, put_in, doubled, replaced)
"""Changes of a file's bytes."""


def damaged(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One of them."""
    return rng.choice(TEXT_CHANGES)(content, rng)
