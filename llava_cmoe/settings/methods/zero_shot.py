"""Settings of `zero_shot`."""

from __future__ import annotations

from typing import Literal

from llava_cmoe.settings.base import Settings


class ZeroShotSettings(Settings):
    """The backbone as it is; learns nothing."""

    name: Literal["zero_shot"] = "zero_shot"
