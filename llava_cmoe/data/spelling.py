"""One spelling for texts that look alike but differ in code points: Unicode writes the same word in several ways.

| what differs | example | becomes |
| --- | --- | --- |
| composition | `e` + U+0301 (as macOS names files) | `é`, one code point (NFC) |
| width | full-width letters, digits and marks (U+FF01 on), half-width katakana | the usual ones |
| invisible signs | zero-width blanks and joiners, soft hyphens, variation selectors, byte order marks | nothing |
| quotes | typographic quotes, primes and corner brackets | `'` and `"` |
| points | an ellipsis, an ideographic full stop or comma | `...`, `.`, `,` |
| dashes | hyphens, figure and en dashes, the minus sign; not the em dash, which parts sentences | `-` |
| blanks | no-break, thin and other blanks on a line | a blank |

Compatibility forms beyond width are left alone: NFKC would read 10² as 102. Case is left to who compares.
"""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from pathlib import Path

ALIKE = {
    "'": "‘’‚‛‹›′‵ʹʼ´",
    '"': "“”„‟«»″‶〝〞〟「」『』",
    "-": "‐‑‒–−﹣",  # U+2010 to U+2013, the minus sign U+2212, the small hyphen
    ".": "․。",
    ",": "、",
    "..": "‥",
    "...": "…",
}
INVISIBLE = (
    "\u00ad\u034f\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062\u2063\u2064"
    "\u2066\u2067\u2068\u2069\u206a\u206b\u206c\u206d\u206e\u206f\u3164\ufe0e\ufe0f\ufeff"
)
LONGEST_NAME = 200
"""Characters of a name that a message repeats."""

TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
SPELLED = {
    **{sign: plain for plain, signs in ALIKE.items() for sign in signs},
    **dict.fromkeys(INVISIBLE, ""),
}


@lru_cache(maxsize=1 << 16)  # annotators and classes repeat themselves
def respell(text: str) -> str:
    r"""The one spelling of a text; line ends stay.

    >>> respell("Cafe\u0301\u200b “bar”…")
    'Café "bar"...'
    """
    if text.isascii():
        return text
    composed = unicodedata.normalize("NFC", text)
    return unicodedata.normalize("NFC", "".join(map(_plain_sign, composed)))


def _plain_sign(sign: str) -> str:
    kind, _, code = unicodedata.decomposition(sign).partition(" ")
    if kind in ("<wide>", "<narrow>"):
        sign = chr(int(code, 16))
    if sign in SPELLED:
        return SPELLED[sign]
    return " " if unicodedata.category(sign) == "Zs" else sign


def is_blank(text: str) -> bool:
    r"""Whether a text shows nothing: blanks, and what has no width.

    >>> is_blank(" \u200b\n"), is_blank("?")
    (True, False)
    """
    return not respell(text).strip()


def breaks_lines(sign: str) -> bool:
    r"""Whether a character begins a line, commands a terminal, or shows what follows it in another order.

    >>> breaks_lines("\n"), breaks_lines("\u202e"), breaks_lines("a")
    (True, True, False)
    """
    return unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or sign in TURNING


def as_named(name: str) -> str:
    """A name as messages give it: as it stands, but on one line and not longer than is read."""
    if len(name) <= LONGEST_NAME and not any(map(breaks_lines, name)):
        return name
    return spelled_out(repr(name)[:LONGEST_NAME]) + "..." * (len(name) > LONGEST_NAME)


def other_spelling_on_disk(path: Path) -> Path | None:
    """What lies on disk instead of a missing file or folder, if it looks the same and is spelled otherwise.

    An archive that was packed on another system often names its files in another Unicode form than the rows do.
    """
    absent = path
    while not os.path.isdir(absent.parent) and absent.parent != absent:
        absent = absent.parent
    if not os.path.isdir(absent.parent) or os.path.lexists(absent):
        return None
    name = _names_in(absent.parent, absent.parent.stat().st_mtime_ns).get(respell(absent.name))
    return None if name is None else absent.with_name(name)


@lru_cache(maxsize=8)  # a folder of a million pictures is listed once, though thousands of rows miss one
def _names_in(folder: Path, changed: int) -> dict[str, str]:
    return {respell(name): name for name in sorted(os.listdir(folder), reverse=True)}


def spelled_out(text: str) -> str:
    r"""A text whose signs beyond ASCII are given as code points, for messages about texts that look the same.

    >>> spelled_out("cafe\u0301.jpg")
    'cafe\\u0301.jpg'
    """
    return text.encode("ascii", "backslashreplace").decode("ascii")
