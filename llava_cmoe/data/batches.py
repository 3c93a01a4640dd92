"""Batches on the model's device: of some rows in order, or of this process's share of them.

Training makes its own batches (`transformers.Trainer`); this is for passes that read, count or measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import Processor, tokenizer_of

Batch = Mapping[str, Tensor]
"""What a model is given, by name: `input_ids` and `attention_mask` (B, T), pictures, `labels` where it learns."""


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The same batch, where the model is."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def batches(
    rows: Dataset[dict[str, Tensor]],
    processor: Processor,
    batch_size: int,
    device: torch.device,
    side: Literal["left", "right"] = "right",
) -> Iterator[dict[str, Tensor]]:
    """Rows in their order, padded on one side, on the device."""
    collator = Collator(tokenizer_of(processor).pad_token_id, side)
    loader: DataLoader[Any] = DataLoader(rows, batch_size=batch_size, collate_fn=collator)
    return (on_device(batch, device) for batch in loader)


def share_of(rows: Dataset[dict[str, Tensor]]) -> Subset[dict[str, Tensor]]:
    """This process's share: every n-th row of n processes; all of them are counted once over all processes."""
    state = PartialState()
    return Subset(rows, list(range(len(rows)))[state.process_index :: state.num_processes])  # type: ignore[arg-type]
