"""Settings of `ewc`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.methods.sequential_lora import SequentialLoraSettings


class EwcSettings(SequentialLoraSettings):
    """Elastic weight consolidation: sequential LoRA, held near what mattered to the tasks before."""

    name: Literal["ewc"] = "ewc"  # type: ignore[assignment]
    weight: float = Field(100.0, ge=0)
    """lambda, the weight of sum F (theta - theta*)^2."""
    fisher_rows: int = Field(200, gt=0)
    """Rows of a task, drawn at random, over which its Fisher information is averaged; fewer where it has fewer."""
    decay: float = Field(1.0, gt=0, le=1)
    """What earlier tasks' information is multiplied by when a task's is added; 1 keeps all of it."""
