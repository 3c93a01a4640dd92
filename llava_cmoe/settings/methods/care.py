"""Settings of `care`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings


class CareSettings(Settings):
    """CaRE: an expert, a router and a perceptron per task and layer, chosen by entropy, beside a shared expert."""

    name: Literal["care"] = "care"
    rank: int = Field(16, gt=0)
    """LoRA rank of one expert."""
    alpha: float = Field(32.0, gt=0)
    """LoRA scale (alpha / rank multiplies an expert's output)."""
    num_routers: int = Field(2, gt=0)
    """Routers that decide for a sample: those whose perceptrons are surest."""
    num_experts: int = Field(3, gt=0)
    """Experts that each of these routers gives a sample; fewer where it knows fewer."""
    num_classes: int = Field(8, gt=1)
    """Pseudo-classes of a task, which its perceptrons tell apart; fewer where the task has fewer rows."""
    class_weight: float = Field(0.1, ge=0)
    """Weight of the mean over layers of the perceptrons' loss."""
    momentum: float = Field(0.999, ge=0, le=1)
    """Of the shared expert between tasks: how much of it stays as the earlier tasks left it."""
    layer: int = 1
    """LLM layer of the frozen model whose state of the prompt is clustered into pseudo-classes; 0 is the embedding."""
    feature: Literal["last", "mean", "vision", "text"] = "mean"
    """State of the last prompt token, or mean state of all, of the image's, or of all others."""
