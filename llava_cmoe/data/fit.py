"""Whether a backbone can take a row, from its texts alone: one rule for the check of data and for what learns or asks.

Special tokens are found in `special_tokens.py`, what the chat template makes of a row in `conversation.py`. How long a
row is, and whether its picture opens, is looked at elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llava_cmoe.data.coin import NO_PICTURES, Parsed, Read
from llava_cmoe.data.conversation import ChatTemplateError, split, tokenizer_of
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.special_tokens import special_texts, why_special
from llava_cmoe.data.tasks import TaskSpec


class Fit:
    """What a backbone's processor takes."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.special = special_texts(processor)
        self.reads_images = tokenizer_of(processor) is not processor

    def why_not(self, row: Any) -> str | None:
        """What is wrong with a canonical row for this backbone, if anything."""
        if row["image"] is not None and not self.reads_images:
            return NO_PICTURES
        if reason := why_special(row["turns"], self.special):
            return reason
        try:
            split(self.processor, row["turns"])
        except ChatTemplateError as error:
            return str(error)
        return None


def check_fit(
    rows: Iterable[Any], fit: Fit, parse: Callable[[Path, TaskSpec], Parsed], root: Path, task: TaskSpec
) -> None:
    """Stop at the first row that the backbone cannot take.

    Args:
        rows: of the task, those that are learned or asked.
        fit: what it takes.
        parse: reads the file that the rows are from; called only to name the place of one that is wrong.
        root: the data root.
        task: whose rows they are.

    Raises:
        DataError: names file, row and reason.
    """
    for row in rows:
        if (reason := fit.why_not(row)) is not None:
            same = (
                item
                for item in parse(root, task)
                if isinstance(item, Read)
                and (item.row["image"], item.row["turns"][: len(row["turns"])]) == (row["image"], row["turns"])
            )
            found = next(same)
            raise DataError(Problem(found.file, reason, found.index, found.row["id"]))
