"""Trains under the engine of the launch, and prints as JSON what it holds, and what it leaves behind.

`held`, of each recipe in the optimizer's step: bytes by part, as `planning/memory.py` names them, and the widths of
what is trained. `left`, after each of eight stages of one adapter: engines that are alive, and bytes of all tensors.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.experts.ledger import size_of
from llava_cmoe.methods.base import no_extra_loss
from llava_cmoe.methods.sequential_lora import SequentialLora
from llava_cmoe.registry.restore import build_method
from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.methods.sequential_lora import SequentialLoraSettings
from llava_cmoe.settings.run import Recipe
from llava_cmoe.settings.training import TrainingSettings
from llava_cmoe.training.processes import processes
from llava_cmoe.training.stage import train_stage

ROW = {name: torch.arange(4, 12) for name in ("input_ids", "labels")} | {"attention_mask": torch.ones(8).long()}


def held_by(recipe: Recipe) -> dict[str, Any]:
    """Bytes by part, in the second task."""
    method = build_method(recipe, load_backbone(recipe.backbone))
    next(fit for fit in method.planned_fits(2) if (fit.stage, fit.label) == (1, "training"))
    held: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        step = DeepSpeedEngine.step
        patch.setattr(DeepSpeedEngine, "step", lambda engine: (look(engine, held), step(engine)))
        train_stage(
            method.model,
            [ROW] * recipe.training.batch_size,
            method.training_context,
            recipe.training,
            pad_token_id=0,
            seed=0,
            folder=Path(tempfile.mkdtemp()),
        )
    return held


def look(engine: DeepSpeedEngine, held: dict[str, Any]) -> None:
    """Read weights and gradients now, and inside the step the optimizer's states with what lies beside them."""
    weights = [(getattr(one, "ds_tensor", one), one.requires_grad) for one in engine.module.parameters()]
    trained = [one for one, learns in weights if learns]
    spread = [one for group in engine.optimizer.averaged_gradients.values() for one in group]
    held["frozen"] = bytes_of(one for one, learns in weights if not learns)
    held["trained"], held["gradients"] = bytes_of(trained), bytes_of(spread)
    held["widths"] = sorted({one.element_size() for one in (*trained, *spread)})
    lying = {one.untyped_storage().data_ptr() for one in trained}

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [one for group in optimizer.param_groups for one in group["params"]]
        copies = [one for one in weights if one.untyped_storage().data_ptr() not in lying]
        states = [
            value
            for state in optimizer.state.values()
            for name, value in state.items()
            if torch.is_tensor(value) and name != "step" and not name.startswith("qmap")  # one for all parameters
        ]
        held["optimizer"] = bytes_of([*copies, *(one.grad for one in weights), *states])

    engine.optimizer.optimizer.register_step_post_hook(stepped)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of all of them together."""
    return size_of(tensors).bytes


def left_by(folder: Path) -> Iterator[dict[str, int]]:
    """What each of eight stages leaves, an engine for each."""
    backbone = load_backbone(BackboneSettings(path=folder))
    method = SequentialLora(SequentialLoraSettings(rank=4, alpha=8), backbone.model, backbone.processor, seed=0)
    gc.collect()
    gc.freeze()  # what is there already, of recipes before
    for _ in range(8):
        train_stage(
            method.model,
            [ROW] * 4,
            lambda batch: nullcontext(no_extra_loss),
            TrainingSettings(batch_size=2),
            pad_token_id=0,
            seed=0,
            folder=Path(tempfile.mkdtemp()),
        )
        alive = gc.get_objects()
        tensors = {found.untyped_storage().data_ptr(): found for found in alive if type(found) is torch.Tensor}
        tensors |= {value.untyped_storage().data_ptr(): value for value in method.model.parameters()}
        yield {
            "engines": sum(isinstance(found, DeepSpeedEngine) for found in alive),
            "bytes": bytes_of(tensors.values()),
        }


if __name__ == "__main__":
    gc.freeze()  # what is imported stays; each fit would look through it all
    processes()
    recipes = [Recipe.model_validate_json(argument) for argument in sys.argv[1:]]
    left = list(left_by(recipes[0].backbone.path))
    print(json.dumps({"held": [held_by(recipe) for recipe in recipes], "left": left}))
