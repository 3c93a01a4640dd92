"""One file per method, and the table that finds it by the name a recipe gives."""

from llava_cmoe.methods.base import Method
from llava_cmoe.methods.care import Care
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.methods.dymoe import DyMoe
from llava_cmoe.methods.ewc import Ewc
from llava_cmoe.methods.hide import Hide
from llava_cmoe.methods.inc_moelora import IncMoeLora
from llava_cmoe.methods.joint import Joint
from llava_cmoe.methods.lora_per_task import LoraPerTask
from llava_cmoe.methods.lwf import Lwf
from llava_cmoe.methods.merging import Merging
from llava_cmoe.methods.moe_adapters import MoeAdapters
from llava_cmoe.methods.moelora import MoeLora
from llava_cmoe.methods.o_lora import OLora
from llava_cmoe.methods.patch_routing import PatchRouting
from llava_cmoe.methods.pmoe import Pmoe
from llava_cmoe.methods.r2moe import R2moe
from llava_cmoe.methods.reg_lora import RegLora
from llava_cmoe.methods.replay import Replay
from llava_cmoe.methods.sequential_lora import SequentialLora
from llava_cmoe.methods.zero_shot import ZeroShot
from llava_cmoe.settings.methods import MethodSettings

METHODS: dict[str, type[Method]] = {
    "zero_shot": ZeroShot,
    "sequential_lora": SequentialLora,
    "joint": Joint,
    "replay": Replay,
    "ewc": Ewc,
    "lwf": Lwf,
    "o_lora": OLora,
    "reg_lora": RegLora,
    "merging": Merging,
    "lora_per_task": LoraPerTask,
    "hide": Hide,
    "moelora": MoeLora,
    "inc_moelora": IncMoeLora,
    "dymoe": DyMoe,
    "moe_adapters": MoeAdapters,
    "care": Care,
    "patch_routing": PatchRouting,
    "pmoe": Pmoe,
    "r2moe": R2moe,
    "cmoe": Cmoe,
}


def method_of(settings: MethodSettings) -> type[Method]:
    """The class of the method that these are the settings of."""
    return METHODS[settings.name]
