"""One stage of training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings


class TrainingSettings(Settings):
    """One stage of training; passed on to `transformers.TrainingArguments`."""

    batch_size: int = Field(16, gt=0)
    """Samples per optimizer step and process, before accumulation."""
    accumulation: int = Field(1, gt=0)
    """Batches per optimizer step."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the task's training rows."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps spent warming up; cosine decay follows."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    optimizer: Literal["adamw", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """AdamW, or bitsandbytes': its moments in 8 bits (2 bytes a trained parameter instead of 8), or paged out to the
    CPU where a GPU's memory runs short; on a CPU a paged one is not paged."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 turns clipping off."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of forward and backward (bf16 is autocast)."""
    max_length: int = Field(2048, gt=0)
    """Longest sample in tokens; a longer one is an error before training starts."""
    checkpoint_steps: int | None = Field(None, gt=0, multiple_of=5)
    """Optimizer steps between two checkpoints inside a stage, a multiple of 5 (losses are logged so often); none when
    absent: a killed stage is then learned again from its start."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer, and compute the layer again for its gradients: less memory, a third more time,
    the same gradients."""
    group_by_length: bool = False
    """A step reads rows of like length, and rows with a picture apart from those without: less padding to compute."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | None = None
    """Where losses are reported while training: TensorBoard (files in RUN/logs), or a service; TensorBoard where it is
    installed when absent, nowhere with []. Changes no result, and a run may go on with another."""
