"""The processes of this launch: one, or those that `accelerate launch` started; stops where it started others.

Some launches fail in silence: every process then believes that it is alone, learns from all rows and writes the same
files as its neighbours. What DeepSpeed does around a stage is `zero.py`'s.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from llava_cmoe.methods import method_of
from llava_cmoe.settings.run import Recipe


class LaunchError(RuntimeError):
    """A launch that did not start what its configuration asks for; the message names the reason and the fix."""


def processes() -> PartialState:
    """The processes of this launch.

    Raises:
        LaunchError: fewer processes found each other than were started, or DeepSpeed was asked for and turned off.
    """
    if deepspeed_asked() and parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise LaunchError(
            "the launch asks for DeepSpeed and for use_cpu, which turns DeepSpeed off; leave use_cpu out: on a machine "
            "without GPUs DeepSpeed takes the CPU by itself"
        )
    state, started = PartialState(cpu=not torch.cuda.is_available()), int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise LaunchError(
            f"the launch started {started} processes, and this one sees {state.num_processes}: nothing connects them; "
            "start with accelerate launch --config_file zero_configs/NAME.yaml"
        )
    return state


def deepspeed_asked() -> bool:
    """Whether the launch's configuration asks for DeepSpeed."""
    return bool(parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))


def check_engine_holds(recipe: Recipe) -> None:
    """Stop before a backbone is loaded for an engine that could not hold it, or what is learned on it.

    Raises:
        LaunchError: ZeRO-3 on weights in 8 or 4 bits, or a method that cannot learn under it.
    """
    if not deepspeed_asked():
        return
    quantization = recipe.backbone.quantization
    zero_stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))  # accelerate's default
    if zero_stage == 3 and quantization != "none":
        raise LaunchError(
            f"ZeRO-3 cannot spread weights in {quantization}: bitsandbytes packs them; choose zero_configs/zero2.yaml, "
            "or backbone.quantization: none"
        )
    if reason := method_of(recipe.method).refusal(recipe.method, zero_stage):
        raise LaunchError(reason)
