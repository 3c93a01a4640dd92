"""Settings of `r2moe`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings


class R2moeSettings(Settings):
    """R2MoE: a null expert and one per task, an additive router that is distilled, redundant experts removed."""

    name: Literal["r2moe"] = "r2moe"
    rank: int = Field(32, gt=0)
    """LoRA rank of one expert."""
    alpha: float = Field(64.0, gt=0)
    """LoRA scale (alpha / rank multiplies an expert's output)."""
    layer: int = 1
    """LLM layer whose state of the prompt routes, read from the frozen model in a pass that stops there: 0 is the
    embedding, -1 the last layer. A choice: a feature that experts can move would let old routes drift."""
    feature: Literal["last", "mean", "vision", "text"] = "mean"
    """State of the last prompt token, or mean state of all, of the image's, or of all others."""
    num_old: int = Field(2, ge=0)
    """Old experts that take part beside the newest while a task is learned."""
    num_chosen: int = Field(3, gt=0)
    """Experts that take part in an answer."""
    distillation_weight: float = Field(1e-5, ge=0)
    """Weight of the sum over sites of |C dR_t|_F, C being the earlier tasks' routing features."""
    remove_below: float = Field(0.4, ge=0, lt=1)
    """A task's expert is removed from a site where its mean gate on the task's own prompts is below; 0 keeps all."""
    recovery_epochs: float = Field(0.0, ge=0)
    """Passes over the task's rows after experts were removed, to recover; 0 for none."""
