"""Trains recipes one step under the engine of the launch, and prints as JSON what it holds in the optimizer's step.

Of each recipe: bytes by part, as `planning/memory.py` names them, and the widths of what is trained.
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.experts.ledger import size_of
from llava_cmoe.registry.restore import build_method
from llava_cmoe.settings.run import Recipe
from llava_cmoe.training.processes import processes
from llava_cmoe.training.stage import train_stage


def held_by(recipe: Recipe) -> dict[str, Any]:
    """Bytes by part, in the second task."""
    method = build_method(recipe, load_backbone(recipe.backbone))
    next(fit for fit in method.planned_fits(2) if (fit.stage, fit.label) == (1, "training"))
    held: dict[str, Any] = {}
    row = {name: torch.arange(4, 12) for name in ("input_ids", "labels")} | {"attention_mask": torch.ones(8).long()}
    with pytest.MonkeyPatch.context() as patch:
        step = DeepSpeedEngine.step
        patch.setattr(DeepSpeedEngine, "step", lambda engine: (look(engine, held), step(engine)))
        train_stage(
            method.model,
            [row] * recipe.training.batch_size,
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


if __name__ == "__main__":
    processes()
    print(json.dumps([held_by(Recipe.model_validate_json(argument)) for argument in sys.argv[1:]]))
