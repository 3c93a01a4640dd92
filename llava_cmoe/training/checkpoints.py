"""Checkpoints inside a stage: what is trained, the optimizer, the order of rows and random states, per process.

    runs/NAME/trainer/03_imagenet/training/checkpoint-400/    the Trainer's or DeepSpeed's files, without frozen weights
                                           complete.json      written last: what started it, and a hash per file

They are scaffolding. What was learned is the registry's, and the folder is deleted once the stage is committed. Other
than the registry's, these files hold optimizer states in PyTorch's own format, of which only values are read
(`safe_loading.py`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from llava_cmoe.experts.ledger import trained_parameters
from llava_cmoe.provenance.files import sync, write_atomically, writing_tensors
from llava_cmoe.provenance.fingerprints import fingerprint_each
from llava_cmoe.settings.plain_json import parse_json
from llava_cmoe.training.safe_loading import foreign_contents, values_alone

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
TRAINED = "trained.safetensors"


class CheckpointTrainer(Trainer):
    """The stock Trainer, whose checkpoints leave out what is frozen: of a 7B model, all but some 100 MB."""

    model: PreTrainedModel

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the parameters that are trained; DeepSpeed's own files hold them where it trains."""
        if output_dir is not None and not self.is_deepspeed_enabled and self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in trained_parameters(self.model).items()},
                Path(output_dir) / TRAINED,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINED)
        with torch.no_grad():
            for name, parameter in trained_parameters(self.model).items():
                parameter.copy_(saved[name])

    def _save_checkpoint(self, *args: Any) -> None:
        with writing_tensors(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*args)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            engine.save_checkpoint = partial(type(engine).save_checkpoint, engine, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def resume(self, folder: Path, config_hash: str) -> None:
        """Train, from the last complete checkpoint in a folder that the same recipe, processes and engine left.

        A stage that keeps checkpoints itself begins with removing all others from the folder.

        Args:
            folder: of the stage's checkpoints.
            config_hash: whatever decides what is learned, as one string.
        """
        origin, processes = {**self._origin(), "config_hash": config_hash}, PartialState()
        self.add_callback(_Complete(origin))
        # One that keeps none may be looking on (a calibration) while the folder's owner learns.
        if self.args.save_strategy != SaveStrategy.NO and processes.is_main_process:
            remove_others(folder, origin)
        processes.wait_for_everyone()
        checkpoint = last_complete(folder, origin)
        # DeepSpeed loads strictly; what is frozen is in the model, and not missing in the checkpoint.
        frozen = {name for name, value in self.model.named_parameters() if not value.requires_grad}
        model: Any = self.model
        forgiving = model.register_load_state_dict_post_hook(partial(_forgive, frozen))
        try:
            with values_alone(self.is_deepspeed_enabled):
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            forgiving.remove()

    def _origin(self) -> dict[str, Any]:
        plugin = self.args.deepspeed_plugin
        return {"processes": self.args.world_size, "zero_stage": None if plugin is None else plugin.zero_stage}


class _Complete(TrainerCallback):
    """Marks a checkpoint that every process has finished writing."""

    def __init__(self, origin: dict[str, Any]) -> None:
        self._origin = origin

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._origin)
        processes.wait_for_everyone()


def mark_complete(checkpoint: Path, origin: dict[str, Any]) -> None:
    """Put on record what left a checkpoint and what its files hold, once they are on the disk."""
    files = _files(checkpoint)
    for path in files:
        sync(path)
    mark = {"origin": origin, "files": fingerprint_each(files, checkpoint)}
    write_atomically(checkpoint / COMPLETE, json.dumps(mark).encode())


def last_complete(folder: Path, origin: dict[str, Any]) -> Path | None:
    """The newest of the complete checkpoints that were left by the same recipe, number of processes and engine.

    One that holds more than values, or other files than were written, is none of them.
    """
    left = [path for path in folder.glob("checkpoint-*") if _origin_of(path) == origin]
    newest_first = sorted(left, key=lambda path: (len(path.name), path.name), reverse=True)
    return next((path for path in newest_first if _is_own(path) and _is_whole(path)), None)


def remove_others(folder: Path, origin: dict[str, Any]) -> None:
    """Remove all checkpoints but the one to go on from: the Trainer keeps two, and would count them."""
    kept = last_complete(folder, origin)
    for path in folder.glob("checkpoint-*"):
        if path != kept:
            left = _origin_of(path)
            if left not in (None, origin):
                logger.warning("removing %s, which was left by %s: this is %s", path, left, origin)
            (path / COMPLETE).unlink(missing_ok=True)  # first: half of it must not look complete
            shutil.rmtree(path)


def _is_own(checkpoint: Path) -> bool:
    if foreign := foreign_contents(checkpoint):
        logger.warning("%s is not gone on from, it was not written here: %s", checkpoint, foreign)
    return not foreign


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint holds what was written; a flipped bit of a moment would train something else, silently."""
    written, found = _mark_of(checkpoint)["files"], fingerprint_each(_files(checkpoint), checkpoint)
    changed = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    if changed:
        logger.warning("%s is not gone on from, its %s is not what was written", checkpoint, changed[0])
    return not changed


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE]


def _origin_of(checkpoint: Path) -> dict[str, Any] | None:
    """What left a checkpoint; None for one that was not finished."""
    origin: dict[str, Any] | None = _mark_of(checkpoint)["origin"]
    return origin


def _mark_of(checkpoint: Path) -> dict[str, Any]:
    """What `mark_complete` wrote; nothing where it is damaged, or of an older version without hashes."""
    nothing: dict[str, Any] = {"origin": None, "files": {}}
    try:
        mark = parse_json((checkpoint / COMPLETE).read_bytes())
    except FileNotFoundError:
        return nothing
    except ValueError:
        mark = None
    if isinstance(mark, dict) and all(isinstance(mark.get(key), dict) for key in nothing):
        return mark
    logger.warning("%s is not gone on from, its %s has no hashes or is damaged", checkpoint, COMPLETE)
    return nothing


def _forgive(frozen: set[str], module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in frozen]
