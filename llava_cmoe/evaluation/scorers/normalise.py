"""The one normalisation under which two short answers count as the same; used by every scorer that compares text.

Case, outer punctuation and articles do not matter, and blanks count as one. Nothing else is forgiven: no number words,
no contractions, no inner punctuation, because each further rule makes some pair of different answers equal.
Unlike the VQA evaluation, a rule that would leave nothing is not applied: "a" read off a sign stays "a", and no
reference ever becomes the empty string that an empty answer could match.
"""

from __future__ import annotations

ARTICLES = frozenset({"a", "an", "the"})
"""Dropped wherever they stand as a word of their own, as the VQA evaluation does."""

MARKS = ",;:!?\"'`()[]{}<>…“”‘’«»"
"""Sentence marks, quotes and brackets. Signs that carry meaning stay: "-5", "$5", "50%" and "#1" are not the number."""


def normalise(text: str) -> str:
    """Return the form of an answer that is compared; empty only where the answer has no visible character.

    >>> normalise(' "The Red  Car." ')
    'red car'
    """
    words = text.casefold().split()
    content = " ".join(word for word in words if _without_marks(word) not in ARTICLES)
    whole = " ".join(words)
    return _without_marks(content) or _without_marks(whole) or whole


def _without_marks(text: str) -> str:
    # The full stop is only taken off the end: ".5" is a number.
    return text.lstrip(MARKS + " ").rstrip(MARKS + ". ")
