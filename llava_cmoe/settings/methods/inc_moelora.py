"""Settings of `inc_moelora`, and those that it shares with methods that guide its router."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings


class GrowingExperts(Settings):
    """Experts and router rows that every task adds to each FFN."""

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


class IncMoeLoraSettings(GrowingExperts):
    """Incremental MoELoRA: every task adds experts and router rows in each FFN, old ones are frozen; no locator."""

    name: Literal["inc_moelora"] = "inc_moelora"
