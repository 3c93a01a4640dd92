"""Settings of `reg_lora`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings


class RegLoraSettings(Settings):
    """RegLoRA: a LoRA adapter per task, all of them in the sum, each kept small where earlier ones are large."""

    name: Literal["reg_lora"] = "reg_lora"
    rank: int = Field(128, gt=0)
    """LoRA rank of one task's adapter."""
    alpha: float = Field(256.0, gt=0)
    """LoRA scale (alpha / rank multiplies the update)."""
    key_share: float = Field(0.02, gt=0, le=1)
    """Share of the entries of an adapter's product B A, the largest, that are its key elements."""
    key_weight: float = Field(2500.0, ge=0)
    """Weight of the mean over linears of the new product's mean size at earlier tasks' key elements."""
