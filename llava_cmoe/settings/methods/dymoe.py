"""Settings of `dymoe`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings


class DyMoeSettings(Settings):
    """LLaVA-DyMoE: incremental MoELoRA whose tokens are guided to old or new experts, and taught to stay there."""

    name: Literal["dymoe"] = "dymoe"
    rank: int = Field(16, gt=0)
    """LoRA rank of one expert."""
    alpha: float = Field(32.0, gt=0)
    """LoRA scale (alpha / rank multiplies an expert's output)."""
    num_new: int = Field(2, gt=0)
    """Experts that a task adds to every FFN. Not published."""
    top_k: int = Field(2, gt=0)
    """Experts that a token uses, of all tasks."""
    balance_weight: float = Field(0.01, ge=0)
    """Weight of the balance loss over the task's own experts. Not published."""
    margin: float = Field(0.2, ge=0)
    """A token learns with new experts only if their best score exceeds the old ones' best by this share of the larger
    of the two."""
    routing_weight: float = Field(0.01, ge=0)
    """Weight of the two routing losses, exclusion and specialisation. Not published."""
