"""A file per method with its settings, and the table that finds them by the name that a recipe gives."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from llava_cmoe.settings.methods.care import CareSettings
from llava_cmoe.settings.methods.cmoe import CmoeSettings
from llava_cmoe.settings.methods.dymoe import DyMoeSettings
from llava_cmoe.settings.methods.ewc import EwcSettings
from llava_cmoe.settings.methods.hide import HideSettings
from llava_cmoe.settings.methods.inc_moelora import IncMoeLoraSettings
from llava_cmoe.settings.methods.joint import JointSettings
from llava_cmoe.settings.methods.lora_per_task import LoraPerTaskSettings
from llava_cmoe.settings.methods.lwf import LwfSettings
from llava_cmoe.settings.methods.merging import MergingSettings
from llava_cmoe.settings.methods.moe_adapters import MoeAdaptersSettings
from llava_cmoe.settings.methods.moelora import MoeLoraSettings
from llava_cmoe.settings.methods.o_lora import OLoraSettings
from llava_cmoe.settings.methods.patch_routing import PatchRoutingSettings
from llava_cmoe.settings.methods.pmoe import PmoeSettings
from llava_cmoe.settings.methods.r2moe import R2moeSettings
from llava_cmoe.settings.methods.reg_lora import RegLoraSettings
from llava_cmoe.settings.methods.replay import ReplaySettings
from llava_cmoe.settings.methods.sequential_lora import SequentialLoraSettings
from llava_cmoe.settings.methods.zero_shot import ZeroShotSettings

MethodSettings = Annotated[
    ZeroShotSettings
    | SequentialLoraSettings
    | JointSettings
    | ReplaySettings
    | EwcSettings
    | LwfSettings
    | OLoraSettings
    | RegLoraSettings
    | MergingSettings
    | LoraPerTaskSettings
    | HideSettings
    | MoeLoraSettings
    | IncMoeLoraSettings
    | DyMoeSettings
    | MoeAdaptersSettings
    | CareSettings
    | PatchRoutingSettings
    | PmoeSettings
    | R2moeSettings
    | CmoeSettings,
    Field(discriminator="name"),
]
"""Settings of any method; `name` says whose."""
