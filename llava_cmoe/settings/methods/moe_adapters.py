"""Settings of `moe_adapters`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llava_cmoe.settings.base import Settings
from llava_cmoe.settings.locators import LocatorSettings


class MoeAdaptersSettings(Settings):
    """MoE-Adapters with DDAS: a fixed pool, a noisy top-2 router per task, and the two most used experts frozen."""

    name: Literal["moe_adapters"] = "moe_adapters"
    rank: int = Field(16, gt=0)
    """LoRA rank of one expert."""
    alpha: float = Field(32.0, gt=0)
    """LoRA scale (alpha / rank multiplies an expert's output)."""
    num_experts: int = Field(22, gt=0)
    """Experts in the pool of each FFN, from the first task on."""
    top_k: int = Field(2, gt=0)
    """Experts of a sample at a site."""
    num_frozen: int = Field(2, ge=0)
    """Experts of each site that a task freezes: those it uses most."""
    locator: LocatorSettings = LocatorSettings(kind="autoencoder", feature="mean", score="raw")
    """Which task an input belongs to, and which input to none. Routers read the same feature."""

    @model_validator(mode="after")
    def _routed_by_a_known_feature(self) -> Self:
        if self.locator.free:
            raise ValueError(
                "locator.free finds the feature inside the pass that answers, but routers read it from the first layer "
                "on; set locator.free: false"
            )
        return self
