"""What experts cost beside plain LoRA: tokens a second and memory, of learning and of reading, on made-up rows.

Rows are random tokens with a random picture, and weights may be random: a clock sees only shapes. So a model of any
size is measured without its checkpoint, built from its configuration right on the device. LLaVA's inputs alone are
known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.data.collator import Collator
from llava_cmoe.experts import ledger
from llava_cmoe.experts.surgery import uninstall
from llava_cmoe.methods.base import Method
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.methods.sequential_lora import SequentialLora
from llava_cmoe.pocket.backbone import POCKET_DIR
from llava_cmoe.provenance.versions import versions
from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.cmoe import CmoeSettings
from llava_cmoe.settings.methods.sequential_lora import SequentialLoraSettings
from llava_cmoe.settings.training import TrainingSettings
from llava_cmoe.training.stage import train_stage

WARMUP = 2
"""Steps that are not measured: they choose kernels and allocate."""


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        batch_size: rows of a batch.
        tokens: of a row, without its picture's.
        experts: per site, one of which learns.
        repetitions: measured steps.
    """

    batch_size: int = 4
    tokens: int = 64
    experts: int = 8
    repetitions: int = 10


@dataclass(frozen=True)
class Throughput:
    """What one method costs.

    Attributes:
        trained_parameters: those that learn.
        learning: tokens a second through forward, backward and optimizer step; median over the steps.
        reading: tokens a second through a prefill.
        peak_bytes: most memory held on the GPU while learning, backbone included; None on a CPU.
    """

    trained_parameters: int
    learning: float
    reading: float
    peak_bytes: int | None


def config_of(model: str) -> PretrainedConfig:
    """Configuration of a model by its size's name, or from its folder.

    Raises:
        RecipeError: neither.
    """
    if model == "llava-1.5-7b":
        return LlavaConfig(text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5))
    folder = POCKET_DIR if model == "pocket" else Path(model)
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{model}: no size that is known (pocket, llava-1.5-7b), and no folder with a config.json")
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def random_model(config: PretrainedConfig, settings: BackboneSettings, device: str) -> PreTrainedModel:
    """A frozen model with random weights, made on the device itself: the host never holds a copy."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(  # type: ignore[no-untyped-call]
            config, dtype=getattr(torch, settings.dtype), attn_implementation=settings.attention
        )
    frozen: PreTrainedModel = model.requires_grad_(False).eval()  # type: ignore[no-untyped-call]
    return frozen


class SyntheticRows(Dataset[dict[str, Tensor]]):
    """Rows of one length: a picture, then random tokens, all of which are learned."""

    def __init__(self, config: PretrainedConfig, load: Workload) -> None:
        """As many rows as all steps read."""
        self._config, self._load = config, load

    def __len__(self) -> int:
        return self._load.batch_size * (WARMUP + self._load.repetitions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        config, generator = self._config, torch.Generator().manual_seed(index)
        image, side = int(config.image_token_id), int(config.vision_config.image_size)
        words_T = torch.randint(config.get_text_config().vocab_size - 1, (self._load.tokens,), generator=generator)
        words_T += words_T >= image  # any token but the one that stands for a picture
        ids_T = torch.cat([torch.full((int(config.image_seq_length),), image), words_T])
        labels_T = ids_T.masked_fill(ids_T == image, -100)
        picture = torch.randn(1, 3, side, side, generator=generator)
        return {
            "input_ids": ids_T,
            "attention_mask": torch.ones_like(ids_T),
            "labels": labels_T,
            "pixel_values": picture,
        }


def measure_training(
    model: str,
    random_weights: bool,
    device: str,
    load: Workload,
    backbone: BackboneSettings,
    training: TrainingSettings,
) -> dict[str, Any]:
    """Paces of plain LoRA and of LLaVA-CMoE in their default ranks on one backbone, and how they compare.

    CMoE is measured as it learns a later task: all experts but one per site are frozen, every layer grew each time.

    Raises:
        BackboneError: without `random_weights`, a model that cannot be loaded.
        RecipeError: weights that can be random or quantized, not both.
    """
    if random_weights and backbone.quantization != "none":
        raise RecipeError("random weights are not quantized: give the folder of a checkpoint, or --quantization none")
    if random_weights:
        stock, weights = random_model(config_of(model), backbone, device), "random"
    else:
        loaded = load_backbone(backbone.model_copy(update={"path": model}))
        stock, weights = loaded.model.to(device), loaded.fingerprint  # type: ignore[arg-type]
    rows = SyntheticRows(stock.config, load)
    training = training.model_copy(update={"batch_size": load.batch_size, "epochs": 1.0, "report_to": ()})
    paces = {}
    for name, (put_on, take_off) in MEASURED.items():
        method = put_on(stock, load)
        paces[name] = pace(method, rows, load, training)
        stock = take_off(method)
    return {
        "model": model,
        "weights": weights,
        "parameters": stock.num_parameters(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "load": asdict(load) | {"row_tokens": len(rows[0]["input_ids"])},
        "backbone": backbone.model_dump(exclude={"path"}),
        "training": training.model_dump(include={"precision", "optimizer", "gradient_checkpointing"}),
        "paces": {name: asdict(found) for name, found in paces.items()},
        "cmoe_to_lora": {
            "learning_time": paces["lora"].learning / paces["cmoe"].learning,
            "reading_time": paces["lora"].reading / paces["cmoe"].reading,
        },
        "versions": versions(),
    }


def pace(method: Method, rows: SyntheticRows, load: Workload, training: TrainingSettings) -> Throughput:
    """What a method costs on the device its model lies on."""
    model, ticks = method.model, StepTimer(method.model.device)
    if ticks.on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    with TemporaryDirectory() as folder:
        train_stage(
            model,
            rows,
            method.training_context,
            training,
            pad_token_id=0,
            seed=0,
            folder=Path(folder),
            progress=lambda *_: ticks.tick(),
        )
    learning = median(ticks.seconds[WARMUP - 1 :])
    peak = torch.cuda.max_memory_allocated(model.device) if ticks.on_gpu else None
    tokens = load.batch_size * len(rows[0]["input_ids"])
    trained = ledger.trainable(model).parameters
    return Throughput(trained, tokens / learning, tokens / _reading(method, rows, load), peak)


@torch.no_grad()
def _reading(method: Method, rows: SyntheticRows, load: Workload) -> float:
    """Median seconds of a prefill of a whole batch."""
    batch = Collator(pad_token_id=0)([rows[index] for index in range(load.batch_size)])
    prompt = {name: tensor.to(method.model.device) for name, tensor in batch.items() if name != "labels"}
    newest, ticks = torch.full((load.batch_size,), 1), StepTimer(method.model.device)
    for _ in range(WARMUP + load.repetitions):
        ticks.tick()
        with method.answering(prompt, newest):
            method.model(**prompt, use_cache=True, logits_to_keep=1)
    ticks.tick()
    return median(ticks.seconds[WARMUP:])


class StepTimer:
    """Seconds between calls of `tick`, each of which waits for what the device was asked to do."""

    def __init__(self, device: torch.device) -> None:
        """Nothing measured yet."""
        self.on_gpu = device.type == "cuda"
        self.seconds: list[float] = []
        self._last: float | None = None

    def tick(self) -> None:
        """End one span and begin the next."""
        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def _with_lora(stock: PreTrainedModel, load: Workload) -> Method:
    return SequentialLora(SequentialLoraSettings(), stock, None, seed=0)  # type: ignore[arg-type]  # no text is read


def _without_lora(method: Method) -> PreTrainedModel:
    stock: PreTrainedModel = method.model.unload()  # type: ignore[operator]
    return stock


def _with_experts(stock: PreTrainedModel, load: Workload) -> Method:
    method = Cmoe(CmoeSettings(), stock, None, seed=0)  # type: ignore[arg-type]  # no text is read
    generator = torch.Generator().manual_seed(0)
    for site, bank in method.host.banks.items():
        for num in (load.experts - 1, 1):
            bank.freeze()
            bank.grow(num, generator=generator)
            method.routers[site].add_task(bank.ids, bank.anchor.device, generator)
    return method


def _without_experts(method: Method) -> PreTrainedModel:
    uninstall(method.model)
    return method.model


MEASURED: dict[str, tuple[Callable[[PreTrainedModel, Workload], Method], Callable[[Method], PreTrainedModel]]] = {
    "lora": (_with_lora, _without_lora),
    "cmoe": (_with_experts, _without_experts),
}
"""How a method is put on the stock model, and taken off again."""
