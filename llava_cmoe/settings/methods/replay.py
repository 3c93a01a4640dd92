"""Settings of `replay`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.methods.sequential_lora import SequentialLoraSettings


class ReplaySettings(SequentialLoraSettings):
    """Experience replay: sequential LoRA that reads a part of every earlier task's rows again."""

    name: Literal["replay"] = "replay"  # type: ignore[assignment]
    fraction: float = Field(0.01, gt=0, le=1)
    """Share of each earlier task's training rows that is kept, drawn once per task; at least one row."""
