"""Settings of `moelora`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llava_cmoe.settings.base import Settings


class MoeLoraSettings(Settings):
    """CoIN's MoELoRA: experts of rank r/K in every linear, a dense softmax gate per token, shared by all tasks."""

    name: Literal["moelora"] = "moelora"
    rank: int = Field(128, gt=0)
    """Total LoRA rank of a linear, split evenly over its experts."""
    alpha: float = Field(256.0, gt=0)
    """LoRA scale."""
    num_experts: int = Field(8, gt=0)
    """Experts per linear."""

    @model_validator(mode="after")
    def _split_evenly(self) -> Self:
        if self.rank % self.num_experts:
            raise ValueError(f"rank {self.rank} cannot be split evenly over {self.num_experts} experts")
        return self
