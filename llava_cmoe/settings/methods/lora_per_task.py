"""Settings of `lora_per_task`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llava_cmoe.settings.base import Settings
from llava_cmoe.settings.locators import LocatorSettings


class LoraPerTaskSettings(Settings):
    """A fresh LoRA adapter per task, frozen after it; a locator chooses whose answers: what locating alone is worth."""

    name: Literal["lora_per_task"] = "lora_per_task"
    rank: int = Field(32, gt=0)
    """LoRA rank of one task's adapter."""
    alpha: float = Field(64.0, gt=0)
    """LoRA scale (alpha / rank multiplies the update)."""
    locator: LocatorSettings = LocatorSettings()
    """Which task an input belongs to."""

    @model_validator(mode="after")
    def _located_below_adapters(self) -> Self:
        if self.locator.free and self.locator.layer != 0:
            raise ValueError(
                f"locator.free needs a state that no adapter has touched, and locator.layer is {self.locator.layer} "
                "where every layer has adapters; set locator.layer: 0, or locator.free: false"
            )
        return self
