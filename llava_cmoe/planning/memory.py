"""Bytes on one GPU, part by part, for each way to spread a training over several: DDP and DeepSpeed's ZeRO.

    bytes of a parameter    DDP                  ZeRO-1    ZeRO-2    ZeRO-3
    frozen                  w                    w         w         w/n           w: width it is held in
    trained                 w                    4         4         4/n           n: GPUs
    gradient                w, on n > 1 GPUs 2w  4         4/n       4/n           (DDP sends copies)
    optimizer               m                    (8+m)/n   (8+m)/n   (8+m)/n       m: its two moments; ZeRO's copies

bf16 is autocast under every engine (`training/zero.py`), so nothing is cast: the backbone keeps `backbone.dtype`, what
is trained float32. Experts in bfloat16 are DDP's alone (`training/processes.py`). ZeRO holds the weights once more, and
the gradients while it steps, also where they are float32 already (measured, ZeRO-3 too: DeepSpeed 0.19).
Offloading moves all but the weights to the host, with ZeRO-3 these as well.
Beside all this: activations (`activations.py`), CUDA's context, fragmentation, and buckets that ZeRO sends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_cmoe.experts.ledger import Size

FLOAT = 4
"""Bytes of a float32 number."""
MAX_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 holds gathered at a time, at most: `stage3_max_live_parameters`, DeepSpeed's default."""
BLOCK, BLOCKS = 64, 256
"""Weights that share one of NF4's scales, and scales that share one of theirs (double quantization)."""
MOMENTS = 256
"""Values of an 8-bit moment that share a scale."""
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
class ModelStates:
    """What a training stage holds, before it is spread.

    Attributes:
        backbone: bytes of the frozen backbone by its quantization, `none` among them.
        frozen: its parameters.
        pool: earlier tasks' experts and routers.
        trained: what this stage trains.
        optimizer: as in `training.optimizer`.
    """

    backbone: Mapping[str, int]
    frozen: int
    pool: Size
    trained: Size
    optimizer: str

    @property
    def mixed(self) -> bool:
        """Whether experts are held in less than float32, beside their routers: which DeepSpeed cannot hold."""
        return self.trained.bytes < FLOAT * self.trained.parameters


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, on its GPU and on its host.

    Attributes:
        backbone: by quantization; None where DeepSpeed cannot hold it, or not what is trained on it.
        pool: earlier tasks' experts and routers.
        trained: the weights that are trained.
        gradients: of these.
        optimizer: moments, and ZeRO's copies of weights and gradients.
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


def memory_of(states: ModelStates, strategy: Strategy, num_gpus: int) -> Memory:
    """Spread model states over GPUs; the formulas stand on top of this file."""
    if strategy.stage == 0:
        return Memory(
            backbone=states.backbone,
            pool=states.pool.bytes,
            trained=states.trained.bytes,
            gradients=states.trained.bytes * (2 if num_gpus > 1 else 1),
            optimizer=moments(states.trained, states.optimizer),
            gathered=0,
            host=0,
        )
    whole, share = states.trained.parameters, math.ceil(states.trained.parameters / num_gpus)
    optimizer = 2 * FLOAT * share + moments(Size(share, FLOAT * share), states.optimizer)
    gradients = FLOAT * (whole if strategy.stage == 1 else share)
    host = 0
    if strategy.offload:  # ZeRO-2 has no second copy of the gradients there, but a third one of the weights
        host, optimizer, gradients = optimizer + gradients, 0, 0
    held: Mapping[str, int | None] = dict.fromkeys(states.backbone) if states.mixed else states.backbone
    if strategy.stage < 3:
        return Memory(held, states.pool.bytes, FLOAT * whole, gradients, optimizer, 0, host)
    backbone, pool = (math.ceil(size / num_gpus) for size in (states.backbone["none"], states.pool.bytes))
    trained = FLOAT * share
    if strategy.offload:
        host += backbone + pool + trained
        backbone = pool = trained = 0
    # bitsandbytes holds its weights as whole numbers, and ZeRO-3 splits floating point ones only.
    held = dict.fromkeys(states.backbone) | {"none": None if states.mixed else backbone}
    return Memory(held, pool, trained, gradients, optimizer, _gathered(states), host)


def _gathered(states: ModelStates) -> int:
    """Bytes of the parameters that ZeRO-3 holds whole, which are as wide as all of the model is on average."""
    count = states.frozen + states.pool.parameters + states.trained.parameters
    size = states.backbone["none"] + states.pool.bytes + FLOAT * states.trained.parameters
    return size if count <= MAX_LIVE else math.ceil(size * MAX_LIVE / count)


def moments(trained: Size, optimizer: str) -> int:
    """Bytes of AdamW's two moments.

    PyTorch's are as wide as the parameters, bitsandbytes' are not: 32 bits, or 8 with a float32 scale for each block.
    Paged ones count like others: they leave for the host only where a GPU's memory runs short.
    """
    if optimizer == "adamw":
        return 2 * trained.bytes
    if optimizer == "paged_adamw_32bit":
        return 2 * FLOAT * trained.parameters
    return 2 * (trained.parameters + FLOAT * math.ceil(trained.parameters / MOMENTS))


def backbone_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of a backbone by quantization, from its meta model: only the LLM's linears are ever quantized."""
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
