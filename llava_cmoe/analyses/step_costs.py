"""What methods cost side by side: a training step, a prefill and a decoding step on one model's shape.

Every variant is a copy of one model that shares its frozen weights, so that all of them fit at once and take turns:
whatever else the machine does meets all alike, and a ratio is the median of ratios within a turn. Rows are random
tokens with a random picture, and weights may be random: a clock sees only shapes. So a model of any size is measured
without its checkpoint, built from its configuration right on the device. LLaVA's inputs alone are known here.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from llava_cmoe.experts import ledger
from llava_cmoe.methods.base import ExtraLoss, no_extra_loss
from llava_cmoe.pocket.backbone import POCKET_DIR
from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.base import RecipeError

WARMUP = 2
"""Turns that are not measured: they choose kernels and allocate."""
DECODED = 4
"""Tokens that are decoded after a prefill; their steps are measured together."""
LEARNING_RATE = 1e-4

Batch = dict[str, Tensor]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Variant:
    """One way to learn and answer, put on a copy of the model.

    Attributes:
        model: the copy, its adapters trainable.
        training: the context of a training step, which gives the method's terms of the loss.
        answering: the context of an answer to a batch.
    """

    model: PreTrainedModel
    training: Callable[[Batch], AbstractContextManager[ExtraLoss]]
    answering: Callable[[Batch], AbstractContextManager[object]]


@contextmanager
def plain(batch: Batch) -> Iterator[ExtraLoss]:
    """Of a variant that needs no context."""
    del batch
    yield no_extra_loss


@dataclass(frozen=True)
class Load:
    """What is done.

    Attributes:
        batch_size: rows of a batch.
        tokens: of a row, without its picture's.
        turns: that are measured.
        checkpointing: whether a training step computes layers again in backward.
    """

    batch_size: int = 4
    tokens: int = 64
    turns: int = 10
    checkpointing: bool = False


@dataclass(frozen=True)
class StepCosts:
    """What one variant costs, medians over the turns.

    Attributes:
        trained_parameters: those that learn.
        step: seconds of a training step: forward, backward, and AdamW's own.
        prefill: seconds to read a batch of prompts.
        decoding: seconds to decode one token of each prompt of a batch.
        operations: that such a step gives to the device.
        bytes_more: most GPU memory that a training step took beyond all that lay there; None on a CPU.
    """

    trained_parameters: int
    step: float
    prefill: float
    decoding: float
    operations: int
    bytes_more: int | None


def config_of(model: str) -> PretrainedConfig:
    """Configuration of a model by its size's name, or from its folder.

    Raises:
        RecipeError: neither.
    """
    if model == "llava-1.5-7b":
        return LlavaConfig(text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5))
    if model == "small":  # wide enough that matrix products decide, as at 7B; 144 tokens a picture
        vision = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=168,
            patch_size=14,
        )
        text = LlamaConfig(
            vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16
        )
        return LlavaConfig(text_config=text, vision_config=vision, image_token_index=1000, image_seq_length=144)
    folder = POCKET_DIR if model == "pocket" else Path(model)
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"{model}: no size that is known (pocket, small, llava-1.5-7b), and no folder with a config.json"
        )
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


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters and buffers are the model's own, to wrap its modules; no weight is copied."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def made_up_batch(config: PretrainedConfig, load: Load, device: torch.device) -> Batch:
    """Rows of one length: a picture, then random tokens, all of which are learned."""
    generator, image = torch.Generator().manual_seed(0), int(config.image_token_id)
    shape = load.batch_size, load.tokens
    words_BT = torch.randint(config.get_text_config().vocab_size - 1, shape, generator=generator)
    words_BT += words_BT >= image  # any token but the one that stands for a picture
    picture_BT = torch.full((load.batch_size, int(config.image_seq_length)), image)
    ids_BT = torch.cat([picture_BT, words_BT], dim=1)
    side = int(config.vision_config.image_size)
    batch = {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "labels": ids_BT.masked_fill(ids_BT == image, -100),
        "pixel_values": torch.randn(load.batch_size, 3, side, side, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation that reaches the device."""

    def __init__(self) -> None:
        """None yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.num: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += 1
        return func(*args, **(kwargs or {}))


def measure(
    variants: Mapping[str, Variant], batch: Batch, load: Load, learns: bool = True
) -> tuple[dict[str, StepCosts], list[dict[str, dict[str, float]]]]:
    """Costs of each variant, and the seconds of each turn, by variant and by what was done.

    Args:
        variants: on copies of one model.
        batch: of made-up rows.
        load: how often.
        learns: whether a training step is measured, too.
    """
    device = batch["input_ids"].device
    timers = {name: _Timed(variant, batch, load, learns) for name, variant in variants.items()}
    turns = list(in_turns({name: timer.turn for name, timer in timers.items()}, load.turns))
    found = {}
    for name, timer in timers.items():
        middle = {part: median(turn[name][part] for turn in turns) for part in turns[0][name]}
        found[name] = StepCosts(
            trained_parameters=ledger.trainable(timer.variant.model).parameters,
            step=middle.get("step", 0.0),
            prefill=middle["prefill"],
            decoding=middle["decoding"],
            operations=timer.operations(),
            bytes_more=timer.bytes_more if device.type == "cuda" else None,
        )
    return found, turns


def in_turns(done: Mapping[str, Callable[[], Found]], turns: int) -> Iterator[dict[str, Found]]:
    """What each of some things gives, turn by turn, another one first each time; what is warmed up by is left out."""
    names = list(done)
    for turn in range(-WARMUP, turns):
        first = turn % len(names)
        found = {name: done[name]() for name in (*names[first:], *names[:first])}
        if turn >= 0:
            yield found


def ratio(turns: Sequence[dict[str, dict[str, float]]], one: str, other: str, part: str) -> dict[str, float]:
    """Median and quartiles of one variant's seconds by another's within a turn."""
    ratios = [turn[one][part] / turn[other][part] for turn in turns]
    lower, middle, upper = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": middle, "lower_quartile": lower, "upper_quartile": upper}


class _Timed:
    """One variant's turns."""

    def __init__(self, variant: Variant, batch: Batch, load: Load, learns: bool) -> None:
        self.variant, self.batch, self.learns = variant, batch, learns
        self.device = batch["input_ids"].device
        self.prompt = {name: tensor for name, tensor in batch.items() if name != "labels"}
        self.bytes_more = 0
        trained = [parameter for parameter in variant.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE) if learns else None
        if load.checkpointing:
            variant.model.activation_checkpointing_enable({"use_reentrant": False})

    def turn(self) -> dict[str, float]:
        """Seconds of a training step, of a prefill, and of a decoding step after it."""
        seconds = {}
        if self.learns:
            began = now(self.device)
            self._step()
            seconds["step"] = now(self.device) - began
        self.variant.model.eval()  # type: ignore[no-untyped-call]
        with torch.no_grad(), self.variant.answering(self.prompt):
            began = now(self.device)
            output = self.variant.model(**self.prompt, use_cache=True, past_key_values=DynamicCache(), logits_to_keep=1)
            seconds["prefill"] = now(self.device) - began
            began = now(self.device)
            for _ in range(DECODED):
                output = self._decode(output)
            seconds["decoding"] = (now(self.device) - began) / DECODED
        return seconds

    def operations(self) -> int:
        """Of a decoding step, once what a plan works out is worked out."""
        with torch.no_grad(), self.variant.answering(self.prompt):
            output = self.variant.model(**self.prompt, use_cache=True, past_key_values=DynamicCache(), logits_to_keep=1)
            output = self._decode(output)
            with Operations() as counted:
                self._decode(output)
        return int(counted.num)

    def _step(self) -> None:
        model, on_gpu = self.variant.model, self.device.type == "cuda"
        before = 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        model.train()
        half = model.dtype == torch.bfloat16
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16) if half else nullcontext()
        with self.variant.training(self.batch) as extra_loss:
            with autocast:
                output = model(**self.batch, use_cache=False)
                loss = output.loss + extra_loss(output)
            loss.backward()
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if on_gpu:
            self.bytes_more = max(self.bytes_more, torch.cuda.max_memory_allocated() - before)

    def _decode(self, output: Any) -> Any:
        cache = output.past_key_values
        ids_B1 = output.logits[:, -1:].argmax(dim=-1)
        mask_BT = self.batch["attention_mask"].new_ones(len(ids_B1), cache.get_seq_length() + 1)
        return self.variant.model(
            input_ids=ids_B1, attention_mask=mask_BT, past_key_values=cache, use_cache=True, logits_to_keep=1
        )


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
