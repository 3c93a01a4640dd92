"""Settings of `hide`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.locators import LocatorSettings
from llava_cmoe.settings.methods.lora_per_task import LoraPerTaskSettings


class HideSettings(LoraPerTaskSettings):
    """HiDe-LLaVA: an adapter per task; the lower layers answer with the sum of all, the upper ones with a mixture."""

    name: Literal["hide"] = "hide"  # type: ignore[assignment]
    mixed_layers: int = Field(1, ge=0)
    """Upper LLM layers whose adapters are mixed by how near a prompt is to each task; those below are summed."""
    locator: LocatorSettings = LocatorSettings(
        kind="prototype",
        feature="mean",
        score="raw",
        selection="soft",
        temperature=0.2,
        num_mixed=64,
        unseen_threshold=1e6,
    )
    """How near a prompt is to the mean feature of each task; every task counts, and no prompt is refused. A distance of
    normalised features is twice one minus their cosine, so its T is twice a cosine's."""
