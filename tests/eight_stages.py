"""Trains a tiny model in eight stages, an engine for each, and prints as JSON what each leaves in memory."""

import gc
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.methods.base import no_extra_loss
from llava_cmoe.methods.sequential_lora import SequentialLora
from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.methods.sequential_lora import SequentialLoraSettings
from llava_cmoe.settings.training import TrainingSettings
from llava_cmoe.training.processes import processes
from llava_cmoe.training.stage import train_stage


def main(folder: str) -> None:
    """Train on the same four rows, eight times."""
    gc.freeze()  # what is imported stays
    processes()
    backbone = load_backbone(BackboneSettings(path=folder))
    method = SequentialLora(SequentialLoraSettings(rank=4, alpha=8), backbone.model, backbone.processor, seed=0)
    row = {name: torch.arange(4, 12) for name in ("input_ids", "labels")} | {"attention_mask": torch.ones(8).long()}
    left = []
    for _ in range(8):
        train_stage(
            method.model,
            [row] * 4,
            lambda batch: nullcontext(no_extra_loss),
            TrainingSettings(batch_size=2),
            pad_token_id=0,
            seed=0,
            folder=Path(tempfile.mkdtemp()),
        )
        alive = gc.get_objects()
        tensors = {found.untyped_storage().data_ptr(): found for found in alive if type(found) is torch.Tensor}
        tensors |= {value.untyped_storage().data_ptr(): value for value in method.model.parameters()}
        left.append(
            {
                "engines": sum(isinstance(found, DeepSpeedEngine) for found in alive),
                "bytes": sum(found.untyped_storage().nbytes() for found in tensors.values()),
            }
        )
    print(json.dumps(left))


if __name__ == "__main__":
    main(sys.argv[1])
