"""One file per method, and the table that finds it by the name a recipe gives."""

from llava_cmoe.methods.base import Method
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.methods.joint import Joint
from llava_cmoe.methods.moelora import MoeLora
from llava_cmoe.methods.sequential_lora import SequentialLora
from llava_cmoe.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {
    "zero_shot": ZeroShot,
    "sequential_lora": SequentialLora,
    "joint": Joint,
    "moelora": MoeLora,
    "cmoe": Cmoe,
}
