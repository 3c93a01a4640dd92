"""Settings of `joint`."""

from __future__ import annotations

from typing import Literal

from llava_cmoe.settings.methods.sequential_lora import SequentialLoraSettings


class JointSettings(SequentialLoraSettings):
    """One LoRA adapter trained on the union of all tasks: the upper bound."""

    name: Literal["joint"] = "joint"  # type: ignore[assignment]
