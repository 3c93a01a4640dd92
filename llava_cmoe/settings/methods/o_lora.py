"""Settings of `o_lora`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings


class OLoraSettings(Settings):
    """O-LoRA: a LoRA adapter per task, all of them in the sum, each held orthogonal to those before."""

    name: Literal["o_lora"] = "o_lora"
    rank: int = Field(8, gt=0)
    """LoRA rank of one task's adapter."""
    alpha: float = Field(16.0, gt=0)
    """LoRA scale (alpha / rank multiplies the update)."""
    orthogonal_weight: float = Field(0.5, ge=0)
    """Weight of the sum over linears of |A_t A_i^T|, entry by entry, over all earlier tasks i."""
