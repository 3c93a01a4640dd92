"""Checkpoints read as tensors and plain values: a run folder may be somebody else's, and a pickle can run anything.

DeepSpeed unpickles its own files when it goes on from them. Here torch is told to load values alone, whoever asks it,
and a checkpoint whose files hold anything else is found before, so that its stage begins anew.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch._weights_only_unpickler import UnpicklingError  # type: ignore[attr-defined]
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of plain numbers that ZeRO's states hold; making one runs nothing."""

RANDOM_STATES = {
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
}
"""What the Trainer lets in where it reads random states, which it reads as values, too."""

PATTERNS = ("*.pt", "*.pth", "*.bin", "*.pkl")
UNREADABLE = (UnpicklingError, ValueError, RuntimeError, EOFError, OSError, LookupError, struct.error)
FORCED, FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def foreign_contents(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is more than values, and what it holds; None where all are values.

    Nothing is loaded: what a file would load is read off it.
    """
    for path in sorted(file for pattern in PATTERNS for file in checkpoint.rglob(pattern)):
        if path.name == "training_args.bin":  # written by the Trainer, and never read
            continue
        try:
            found = set(get_unsafe_globals_in_checkpoint(path)) - RANDOM_STATES - {*DEEPSPEED}
        except UNREADABLE as error:
            return f"{path.name} cannot be read as values ({type(error).__name__})"
        if found:
            return f"{path.name} holds {min(found)}"
    return None


@contextmanager
def values_alone(deepspeed: bool) -> Iterator[None]:
    """Let torch load values alone inside, also where the caller asks for more; with DeepSpeed's few classes."""
    before = {name: os.environ.pop(name, None) for name in (FORCED, FORBIDDEN)}
    os.environ[FORCED] = "1"
    try:
        with safe_globals([_named(name) for name in DEEPSPEED] if deepspeed else []):
            yield
    finally:
        os.environ.pop(FORCED)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _named(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)
