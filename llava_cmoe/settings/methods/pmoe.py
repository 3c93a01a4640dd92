"""Settings of `pmoe`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings


class PmoeSettings(Settings):
    """PMoE: one LoRA for all tasks in the shallow layers, an expert per task in the deep ones, a router between."""

    name: Literal["pmoe"] = "pmoe"
    rank: int = Field(16, gt=0)
    """LoRA rank of the shared adapter, and of each expert."""
    alpha: float = Field(32.0, gt=0)
    """LoRA scale (alpha / rank multiplies the update)."""
    depth: float = Field(0.75, gt=0, lt=1)
    """Share of the LLM's layers that are shallow (tau); at least one layer is, and one is deep."""
    freeze_shallow: bool = True
    """Freeze the shared adapter after the first task; with false every task goes on training it."""
    router_weight: float = Field(0.1, ge=0)
    """beta, the weight of the cross-entropy between the router's gate and the true task."""
    replay: float = Field(0.01, ge=0, le=1)
    """Share of each earlier task's rows that are read again while a task is learned, for the router; 0 for none."""
