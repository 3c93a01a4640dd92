"""Encoded rows as one batch: pads what runs along the tokens, concatenates what belongs to pictures.

Rows are encoded by `encoding.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from llava_cmoe.data.conversation import IGNORED

ROW = "row"
"""Key of a sample's place among the rows that are learned; no model reads it."""


@dataclass(frozen=True)
class Collator:
    """Makes batches: right-padded to learn from, left-padded to generate from.

    Attributes:
        pad_token_id: fills `input_ids`; the attention mask is 0 and the label ignored there.
        side: where padding goes.
        dummy: a row with a picture that joins batches without one. Its tokens count as padding and its labels are
            ignored: it only makes the vision encoder run where other processes wait for it.
    """

    pad_token_id: int
    side: Literal["left", "right"] = "right"
    dummy: Mapping[str, Tensor] | None = None

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad tensors along the tokens to (B, T); concatenate those of pictures, which text-only rows have none of."""
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        batch: dict[str, Tensor] = {}
        if self.dummy is not None and not any("pixel_values" in row for row in rows):
            rows = [*rows, dict(self.dummy)]
        for key in dict.fromkeys(key for row in rows for key in row):
            values = [row[key] for row in rows if key in row]
            if key != ROW and all(row[key].shape == row["input_ids"].shape for row in rows if key in row):
                batch[key] = pad_sequence(
                    values, batch_first=True, padding_value=fill.get(key, 0), padding_side=self.side
                )
            else:
                batch[key] = torch.cat(_widened(values))
        return batch


def dummy_image_row(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A row with a picture as a `dummy`: nothing of it is seen, counted or learned in the LLM."""
    hidden = {"attention_mask": torch.zeros_like(row["attention_mask"])}
    return {**row, **hidden, "labels": torch.full_like(row["labels"], IGNORED), ROW: torch.tensor([-1])}


def _widened(values: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with zeros at the end of all axes but the first, up to the largest: pictures of fewer crops."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    missing = [[wanted - size for wanted, size in zip(shape, value.shape[1:], strict=True)] for value in values]
    return [
        pad(value, [end for size in reversed(sizes) for end in (0, size)]) if any(sizes) else value
        for value, sizes in zip(values, missing, strict=True)
    ]
