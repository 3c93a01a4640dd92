"""Settings of `patch_routing`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llava_cmoe.settings.base import Settings
from llava_cmoe.settings.locators import LocatorSettings


class PatchRoutingSettings(Settings):
    """Patch-level routing: each expert of a task chooses its own patches of the picture; a locator chooses the task."""

    name: Literal["patch_routing"] = "patch_routing"
    rank: int = Field(16, gt=0)
    """LoRA rank of one expert."""
    alpha: float = Field(32.0, gt=0)
    """LoRA scale (alpha / rank multiplies an expert's output)."""
    num_new: int = Field(2, gt=0)
    """Experts that each task adds to every FFN of the LLM."""
    capacity: float = Field(1.0, gt=0)
    """Experts that a patch has on average; each expert chooses capacity / num_new of the picture's patches."""
    condition_rank: int = Field(8, gt=0)
    """Rank of the map from the instruction to the weights of a patch's features."""
    locator: LocatorSettings = LocatorSettings()
    """Which task an input belongs to."""

    @model_validator(mode="after")
    def _one_task_before_the_first_layer(self) -> Self:
        if self.locator.free or self.locator.selection == "soft":
            raise ValueError(
                "patches are chosen by the experts of one task, from the first layer on; set locator.free: false and "
                "locator.selection: hard"
            )
        return self
