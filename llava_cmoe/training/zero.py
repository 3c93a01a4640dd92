"""DeepSpeed around one stage: what its engine is told beside the launch's configuration, and a plain model after it.

The Trainer makes the engine. Between stages there is none: a model grows, locates and answers whole, on each process.
So ZeRO saves what a stage trains with (gradients, optimizer states and, with ZeRO-3, the share of the others in the
weights), and never what a forward pass alone needs: under ZeRO-3 each generated token would gather all weights.
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llava_cmoe.training.processes import LaunchError, deepspeed_asked, processes

LEFT = ("_original_parameters", "_external_params", "pre_bwd_fn", "post_bwd_fn")
"""What ZeRO-3 leaves in modules: parameters that are gone, which the next engine would gather, and old engines."""


def configure_deepspeed(arguments: TrainingArguments, bf16: bool) -> None:
    """Complete the engine's configuration, where a launch asked for one; the Trainer fills in what is `auto`.

    bf16 is autocast, as without DeepSpeed. Its own `bf16.enabled` would cast experts and routers, whose float32 is part
    of the method; what is communicated keeps its precision, too.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        return
    plugin.deepspeed_config |= {
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW, also where its states are offloaded:
        "zero_force_ds_cpu_optimizer": False,  # experts are few, and DeepSpeed's own wants a compiler
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


def check_engine(trainer: Trainer) -> None:
    """Stop before the first step where another engine came up than the launch asks for.

    Raises:
        LaunchError: names both.
    """
    processes()  # once more: the Trainer has set them up anew
    found = trainer.accelerator.distributed_type
    if deepspeed_asked() != (found == DistributedType.DEEPSPEED):
        asked = "DeepSpeed" if deepspeed_asked() else "no DeepSpeed"
        raise LaunchError(
            f"the launch asks for {asked}, and {found} came up; start with accelerate launch --config_file "
            "zero_configs/NAME.yaml, and no other launcher around it"
        )


def teardown_deepspeed(trainer: Trainer) -> None:
    """End what training put around and into the model: hooks, shards, buffers; all processes call this.

    DeepSpeed leaves its hooks; what answers now must compute as a restored model does. Parameters that ZeRO-3 had
    spread become whole again, as new objects.
    """
    model: Any = trainer.model
    engine: Any = trainer.model_wrapped
    whole = _gathered(model)
    trainer.accelerator.free_memory()  # destroys the engine, if there is one
    if trainer.is_deepspeed_enabled:
        for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            hook.remove()
        _put_back(model, whole)
        # Hooks in autograd's graph, which Python cannot see, keep a shell of the optimizer; its tensors go.
        vars(engine.optimizer).clear()
        # Else `generate` would wait for processes that have no question left.
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    trainer.model_wrapped = model
    trainer.optimizer = trainer.lr_scheduler = None


def _gathered(model: nn.Module) -> dict[int, nn.Parameter]:
    """Whole copies of the parameters that ZeRO-3 spread over processes, by id of what stands for them."""
    whole: dict[int, nn.Parameter] = {}
    for module in model.modules():
        spread = [value for value in module.parameters(recurse=False) if hasattr(value, "ds_id")]
        if not spread:
            continue
        from deepspeed.runtime.zero import GatheredParameters  # type: ignore[import-untyped]  # takes seconds

        with GatheredParameters(spread):  # one module's at a time
            for value in spread:
                whole[id(value)] = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    return whole


def _put_back(model: nn.Module, whole: dict[int, nn.Parameter]) -> None:
    """Give each module its whole parameters, in the kind of dictionary that torch gave it; ties stay ties."""
    for module in model.modules() if whole else ():
        before = module._parameters
        module._parameters = {
            name: None if value is None else whole.get(id(value), value) for name, value in before.items()
        }
        for value in before.values():
            shard: Any = getattr(value, "ds_tensor", None)
            if shard is not None:  # DeepSpeed remembers the parameter elsewhere, too; its shard goes
                shard.data = shard.new_empty(0)
        for left in LEFT:
            vars(module).pop(left, None)
