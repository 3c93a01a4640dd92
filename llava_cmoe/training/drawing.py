"""Random numbers of one forward pass, from a seed of its own; the streams around it go on as if nothing was drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawing(seed: int, step: int, number: int, process: int, *, device: torch.device) -> Iterator[None]:
    """Draw by these four alone inside: the stage's seed, its step, the pass within the step, the process."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(pass_seed(seed, step, number, process))
        yield


def pass_seed(seed: int, step: int, number: int, process: int) -> int:
    """Another number for any other four."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{number}/{process}".encode()).digest()[:8]) >> 1
