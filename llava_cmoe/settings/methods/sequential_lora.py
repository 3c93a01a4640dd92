"""Settings of `sequential_lora`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings


class SequentialLoraSettings(Settings):
    """One LoRA adapter (stock PEFT), trained on task after task."""

    name: Literal["sequential_lora"] = "sequential_lora"
    rank: int = Field(128, gt=0)
    """LoRA rank."""
    alpha: float = Field(256.0, gt=0)
    """LoRA scale (alpha / rank multiplies the update)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
