"""Settings of `merging`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings


class MergingSettings(Settings):
    """Merging: an adapter per task, and one merged from all of them that answers, whatever the task."""

    name: Literal["merging"] = "merging"
    rank: int = Field(32, gt=0)
    """LoRA rank of one task's adapter."""
    alpha: float = Field(64.0, gt=0)
    """LoRA scale (alpha / rank multiplies the update)."""
    rule: Literal["arithmetic", "average", "ties", "magmax"] = "ties"
    """How products B A of the tasks become one: their sum (task arithmetic), their mean, TIES, or MagMaX, whose
    adapters go on from each other instead of beginning afresh."""
    coefficient: float | None = Field(None, gt=0)
    """Factor of what is merged; by the rule when absent: 0.4 for arithmetic, 1 for average, 0.55 for TIES, 0.5 for
    MagMaX."""
    kept: float = Field(0.2, gt=0, le=1)
    """Share of each product's entries, the largest, that TIES keeps."""
