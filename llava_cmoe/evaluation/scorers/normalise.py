"""The one normalisation under which two short answers count as the same; used by every scorer that compares text.

Case, outer punctuation, articles and Unicode's several spellings of one text (`data/spelling.py`) do not matter, and
blanks count as one. Nothing else is forgiven: no number words, no contractions, no inner punctuation, because each
further rule makes some pair of different answers equal.

An article is a bare "a", "an" or "the" before a further word. The VQA evaluation drops it wherever it stands, which
also takes the letter out of "A) dog", the initial out of "A. Moss" and the name out of "vitamin A"; here these stay.
Unlike there, too, a rule that would leave nothing is not applied: "a" read off a sign stays "a", and no reference ever
becomes the empty string that an empty answer could match.
"""

from __future__ import annotations

from functools import lru_cache

from llava_cmoe.data.spelling import respell

ARTICLES = frozenset({"a", "an", "the"})
"""Dropped where they stand bare, that is without any mark, before a word that is none of them."""

MARKS = ",;:!?\"'`()[]{}<>"
"""Sentence marks, quotes and brackets; typographic ones have become these. Signs that carry meaning stay: "-5", "$5",
"50%" and "#1" are not the number."""


@lru_cache(maxsize=1 << 16)  # ten annotators agree more often than not
def normalise(text: str) -> str:
    """Return the form of an answer that is compared; empty only where the answer has no visible character.

    >>> normalise(' "The Red  Car." ')
    'red car'
    """
    whole = " ".join(_folded(text).split())
    return _without_articles(_without_marks(whole)) or whole


def _folded(text: str) -> str:
    """Without case; folding it may write a sign in two code points, or in a quote's (U+0149), hence before spelling."""
    return respell(respell(text).casefold())


def _without_marks(text: str) -> str:
    # The full stop is only taken off the end: ".5" is a number.
    return text.lstrip(MARKS + " ").rstrip(MARKS + ". ")


def _without_articles(text: str) -> str:
    kept: list[str] = []  # from the last word to the first
    for word in reversed(text.split()):
        if not (word in ARTICLES and kept and kept[-1] not in ARTICLES and _is_word(kept[-1])):
            kept.append(word)
    return " ".join(reversed(kept))


def _is_word(text: str) -> bool:
    """Whether it has a letter or digit and no mark before it: what follows an article, and not what follows "A"."""
    return text[0] not in MARKS and any(map(str.isalnum, text))
