"""Texts that hold a backbone's own special tokens: one may end an answer early, another stand for a picture.

Which texts those are, only the backbone's tokenizer and processor say; what merely looks like one is text like any.
The marker `<image>` of the first question is a row's own, and `coin_rows.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.data.rows import MARKER, Turn


def special_texts(processor: Any) -> frozenset[str]:
    """What the tokenizer, or the processor before it, does not read as text."""
    tokenizer = tokenizer_of(processor)
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    own = (value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str))
    return frozenset({*tokenizer.all_special_tokens, *added, *own}) - {""}


def why_special(turns: Sequence[Turn], special: Iterable[str]) -> str | None:
    """What is wrong with a conversation's texts, if anything."""
    for number, turn in enumerate(turns):
        text = turn["text"].replace(MARKER, "", 1) if number == 0 else turn["text"]
        if found := [token for token in special if token in text]:
            token = max(found, key=len)
            return (
                f"turn {number} holds {token}, which the backbone reads as a special token and not as text; take it "
                "out, or put a blank into it"
            )
    return None
