"""Encoded rows as one batch: pads what runs along the tokens, concatenates the pictures.

Rows are encoded by `encoding.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_cmoe.data.conversation import IGNORED


@dataclass(frozen=True)
class Collator:
    """Makes batches: right-padded to learn from, left-padded to generate from.

    Attributes:
        pad_token_id: fills `input_ids`; the attention mask is 0 and the label ignored there.
        side: where padding goes.
    """

    pad_token_id: int
    side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad tensors along the tokens to (B, T); concatenate pictures, which a batch of text-only rows has none of."""
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        batch: dict[str, Tensor] = {}
        for key in dict.fromkeys(key for row in rows for key in row):
            values = [row[key] for row in rows if key in row]
            if all(row[key].shape == row["input_ids"].shape for row in rows if key in row):
                batch[key] = pad_sequence(
                    values, batch_first=True, padding_value=fill.get(key, 0), padding_side=self.side
                )
            else:
                batch[key] = torch.cat(values)
        return batch
