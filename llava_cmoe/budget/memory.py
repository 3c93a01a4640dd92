"""Bytes on one GPU, part by part, for each way to spread a training over several: DDP and DeepSpeed's ZeRO.

    bytes a parameter       DDP                  ZeRO-1    ZeRO-2    ZeRO-3
    frozen                  as loaded            c         c         c/n           c: 2 in bf16, 4 in float32
    trained                 4                    c         c         c/n           n: GPUs
    gradient                4, on n > 1 GPUs 8   c         c/n       c/n           (DDP sends copies)
    optimizer               8                    16/n      16/n      16/n          float32: copy, gradient, AdamW's two

Without DeepSpeed experts stay float32 and autocast computes in bf16; DeepSpeed turns the whole model into bf16 and
keeps float32 copies of what it trains. Offloading moves the optimizer, and with ZeRO-3 all parameters, to the host.
Beside all this: activations (`activations.py`), CUDA's context, fragmentation, and buckets that ZeRO sends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

FLOAT = 4
"""Bytes of a float32 number."""
MAX_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 holds gathered at a time, at most: `stage3_max_live_parameters`, DeepSpeed's default."""
BLOCK, BLOCKS = 64, 256
"""Weights that share one of NF4's scales, and scales that share one of theirs (double quantization)."""
CODEBOOKS = FLOAT * (16 + 256 + 1)
"""Bytes that an NF4 linear keeps whatever its size: the 16 values of NF4, the 256 of its scales, their mean."""


@dataclass(frozen=True)
class Strategy:
    """How a training is spread over GPUs: ZeRO's stage, 0 without DeepSpeed, and what rests on the host."""

    name: str
    stage: int
    offload: bool = False


STRATEGIES = (
    Strategy("none or DDP", 0),
    Strategy("ZeRO-1", 1),
    Strategy("ZeRO-2", 2),
    Strategy("ZeRO-2, offload", 2, offload=True),
    Strategy("ZeRO-3", 3),
    Strategy("ZeRO-3, offload", 3, offload=True),
)


@dataclass(frozen=True)
class Load:
    """What a training stage holds, before it is spread.

    Attributes:
        backbone: bytes of the frozen backbone by its quantization, `none` among them.
        frozen: its parameters.
        pool: parameters of earlier tasks' experts and routers.
        trained: parameters that this stage trains.
        compute_bytes: of a number in DeepSpeed's arithmetic, 2 in bf16, 4 in float32.
    """

    backbone: Mapping[str, int]
    frozen: int
    pool: int
    trained: int
    compute_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, on its GPU and on its host.

    Attributes:
        backbone: by quantization; None where ZeRO-3 cannot split it.
        pool: earlier tasks' experts and routers.
        trained: what is trained, in the precision that computes.
        gradients: of that.
        optimizer: float32 copies and AdamW's two moments.
        gathered: parameters that ZeRO-3 holds whole at a time, at most.
        host: what is offloaded.
    """

    backbone: Mapping[str, int | None]
    pool: int
    trained: int
    gradients: int
    optimizer: int
    gathered: int
    host: int

    def states(self, quantization: str) -> int | None:
        """All on the GPU but activations; None where the backbone cannot be held so."""
        backbone = self.backbone[quantization]
        others = self.pool + self.trained + self.gradients + self.optimizer + self.gathered
        return None if backbone is None else backbone + others


def memory_of(load: Load, strategy: Strategy, num_gpus: int) -> Memory:
    """Spread a load over GPUs; the formulas stand on top of this file."""
    if strategy.stage == 0:
        copies = FLOAT * (2 if num_gpus > 1 else 1)
        return Memory(
            backbone=load.backbone,
            pool=FLOAT * load.pool,
            trained=FLOAT * load.trained,
            gradients=copies * load.trained,
            optimizer=2 * FLOAT * load.trained,
            gathered=0,
            host=0,
        )
    wide, whole = load.compute_bytes, strategy.stage < 3
    gradients = wide * load.trained if strategy.stage == 1 else math.ceil(wide * load.trained / num_gpus)
    optimizer = math.ceil(4 * FLOAT * load.trained / num_gpus)
    backbone, pool, trained = (
        wide * count if whole else math.ceil(wide * count / num_gpus)
        for count in (load.frozen, load.pool, load.trained)
    )
    # bitsandbytes holds its weights as whole numbers, and ZeRO-3 splits floating point ones only.
    quantized = {name: size if whole else None for name, size in load.backbone.items()}
    host = 0
    if strategy.offload:
        host, optimizer = optimizer + gradients, 0
        gradients = 0
        if not whole:
            host += backbone + pool + trained
            backbone = pool = trained = 0
    gathered = 0 if whole else wide * min(MAX_LIVE, load.frozen + load.pool + load.trained)
    return Memory(quantized | {"none": backbone}, pool, trained, gradients, optimizer, gathered, host)


def backbone_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of a backbone by quantization, from its outline: only the LLM's linears are ever quantized."""
    plain = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    linears = list(_llm_weights(model))
    rest = plain - sum(weight.numel() * weight.element_size() for weight in linears)
    return {
        "none": plain,
        "8bit": rest + sum(weight.numel() + FLOAT * weight.shape[0] for weight in linears),
        "nf4": rest + sum(nf4_bytes(weight.numel()) for weight in linears),
    }


def nf4_bytes(numel: int) -> int:
    """Half a byte a weight, a byte for each block's scale, and a float32 number for each block of those."""
    scales = math.ceil(numel / BLOCK)
    return math.ceil(numel / 2) + scales + FLOAT * math.ceil(scales / BLOCKS) + CODEBOOKS


def _llm_weights(model: PreTrainedModel) -> Iterator[Tensor]:
    for module in model.get_decoder().modules():  # type: ignore[no-untyped-call]
        if isinstance(module, nn.Linear):
            yield module.weight
