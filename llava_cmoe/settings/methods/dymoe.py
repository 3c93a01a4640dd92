"""Settings of `dymoe`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.methods.inc_moelora import GrowingExperts


class DyMoeSettings(GrowingExperts):
    """LLaVA-DyMoE: incremental MoELoRA whose tokens are guided to old or new experts, and taught to stay there."""

    name: Literal["dymoe"] = "dymoe"
    margin: float = Field(0.2, ge=0)
    """A token learns with new experts only if their best score exceeds the old ones' best by this share of the larger
    of the two."""
    routing_weight: float = Field(0.01, ge=0)
    """Weight of the two routing losses, exclusion and specialisation. Not published."""
