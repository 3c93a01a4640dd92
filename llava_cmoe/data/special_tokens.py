"""Texts that hold a backbone's own special tokens: one may end an answer early, another stand for a picture.

Which texts those are, only the backbone's tokenizer and processor say; what merely looks like one is text like any.
The marker `<image>` of the first question is a row's own, and `coin_rows.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_cmoe.data.coin import Parsed, Read
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.rows import MARKER, Turn
from llava_cmoe.data.tasks import TaskSpec


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


def check_special(
    rows: Iterable[Any], special: frozenset[str], parse: Callable[[Path, TaskSpec], Parsed], root: Path, task: TaskSpec
) -> None:
    """Stop at the first row whose text holds a special token.

    Args:
        rows: of the task, those that are learned or asked.
        special: from `special_texts`.
        parse: reads the file that the rows are from; called only to name the place of one that is wrong.
        root: the data root.
        task: whose rows they are.

    Raises:
        DataError: names file, row and token.
    """
    for row in rows:
        if (reason := why_special(row["turns"], special)) is not None:
            same = (
                item
                for item in parse(root, task)
                if isinstance(item, Read) and item.row["turns"][: len(row["turns"])] == row["turns"]
            )
            found = next(same)
            raise DataError(Problem(found.file, reason, found.index, found.row["id"]))
