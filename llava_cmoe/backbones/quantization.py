"""Holds the linears of a backbone's LLM in 8 bits (LLM.int8) or in 4 (NF4 as in QLoRA), by bitsandbytes.

All else keeps its precision: the head, whose logits rounding moves most; vision encoder and projector, as in LLaVA's
own 4-bit training, because every layer reads what they make of a picture. In a LLaVA of 7 billion weights the LLM's
linears are 92 % of them. What is learned beside them is never quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from llava_cmoe.backbones.model_types import empty_model
from llava_cmoe.settings.backbone import BackboneSettings

NOISE = ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops")
"""Loggers that warn at every product of 8-bit linears, and of a kernel that is not used here."""


def quantization_of(settings: BackboneSettings, config: PretrainedConfig) -> BitsAndBytesConfig | None:
    """How transformers is to quantize the weights while it loads them; None where they stay as they are."""
    if settings.quantization == "none":
        return None
    for name in NOISE:
        logging.getLogger(name).setLevel(logging.ERROR)
    model = empty_model(config)  # in which the LLM is found whatever the architecture
    return BitsAndBytesConfig(
        load_in_8bit=settings.quantization == "8bit",
        load_in_4bit=settings.quantization == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        llm_int8_skip_modules=list(_beside(model, model.get_decoder())),  # type: ignore[no-untyped-call]
    )


def keep_bytes(model: PreTrainedModel) -> None:
    """Let no forward pass rewrite the quantized weights; does nothing to a model that has none.

    On CPUs with AVX512-BF16, bitsandbytes' 4-bit linears repack themselves at their first pass in eval mode: rounded
    once more, and from then on without a gradient for their input, so that training after an evaluation would reach
    the last layer only. Widths that are no multiple of 64 fail.
    """
    linears: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for linear in linears:
        linear.support_avx512bf16_for_cpu = False


def _beside(module: nn.Module, llm: nn.Module, path: str = "") -> Iterator[str]:
    """Paths of the largest modules that neither are the LLM nor hold it."""
    for name, child in module.named_children():
        if child is llm:
            continue
        if any(part is llm for part in child.modules()):
            yield from _beside(child, llm, f"{path}{name}.")
        else:
            yield path + name
