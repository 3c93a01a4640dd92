"""What kinds of models are backbones: those that read images and text, and those that read text alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)


def sees(config: PretrainedConfig) -> bool:
    """Whether such a model reads images."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def writes(config: PretrainedConfig) -> bool:
    """Whether such a model answers in text, that is, can be a backbone."""
    return sees(config) or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def auto_model(config: PretrainedConfig) -> Any:
    """The class of transformers' that makes and loads such a model."""
    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def empty_model(config: PretrainedConfig, **settings: Any) -> PreTrainedModel:
    """The tree of modules alone, on the meta device: a second for a model of any size, and no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_model(config).from_config(config, trust_remote_code=False, **settings)
    return model
