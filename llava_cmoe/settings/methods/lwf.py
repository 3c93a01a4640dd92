"""Settings of `lwf`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.methods.sequential_lora import SequentialLoraSettings


class LwfSettings(SequentialLoraSettings):
    """Learning without forgetting: sequential LoRA that must go on saying what it said before of the new inputs."""

    name: Literal["lwf"] = "lwf"  # type: ignore[assignment]
    weight: float = Field(1.0, ge=0)
    """Weight of the distillation loss."""
    temperature: float = Field(2.0, gt=0)
    """T by which both models' logits are divided."""
