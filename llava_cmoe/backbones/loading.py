"""Loads the frozen backbone: any Hugging Face image-text-to-text model, with its processor and a fingerprint.

Where experts may live in it is for `sites.py`; the pocket backbone's making is for `pocket.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from llava_cmoe.backbones.pocket import POCKET_DIR
from llava_cmoe.backbones.quantization import keep_bytes, quantization_of
from llava_cmoe.fingerprints import fingerprint_files
from llava_cmoe.settings import BackboneSettings

FILE_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
"""What defines a backbone: configuration, tokenizer, chat template, weights. Pickled weights are never read."""


class BackboneError(ValueError):
    """A backbone that cannot be used; the message names the path and the fix."""


@dataclass(frozen=True)
class Backbone:
    """A frozen model in eval mode, its processor, the sha256 over the files both were read from, its quantization."""

    model: PreTrainedModel
    processor: ProcessorMixin
    fingerprint: str
    quantization: str


def load_backbone(settings: BackboneSettings) -> Backbone:
    """Load, freeze and fingerprint the backbone; it stays on the CPU, but a quantized one goes where it will compute.

    Raises:
        BackboneError: no such folder or model, an architecture that is not image-text-to-text, no safetensors,
            weights that do not fit the configuration, no processor, or an attention kernel that is not installed.
    """
    if settings.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise BackboneError(
            "backbone.attention flash_attention_2 needs the package flash-attn and a CUDA GPU, and one of them is not "
            "here; install flash-attn, or set backbone.attention: sdpa"
        )
    folder = _folder(settings.path)
    config = _check_architecture(folder)
    files = [path for pattern in FILE_PATTERNS for path in folder.glob(pattern)]
    return Backbone(
        model=_load_model(folder, settings, config),
        processor=_load_processor(folder),
        fingerprint=fingerprint_files(files, root=folder),
        quantization=settings.quantization,
    )


def load_processor(path: str) -> ProcessorMixin:
    """The processor alone, for what needs no weights; `path` and errors as for `load_backbone`."""
    return _load_processor(_folder(path))


def _folder(path: str) -> Path:
    """The folder that holds the backbone's files, fetched from the Hub (or its cache) for a model's name."""
    folder = POCKET_DIR if path == "pocket" else Path(path).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(path, allow_patterns=list(FILE_PATTERNS)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise BackboneError(
            f"backbone.path {path}: no such folder, and no such model on the Hub or in its cache; "
            f"give the folder that holds config.json ({type(error).__name__})"
        ) from error


def read_config(folder: Path) -> PretrainedConfig:
    """What a folder's config.json describes.

    Raises:
        BackboneError: no such file, or an architecture that is not image-text-to-text.
    """
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder}: no config.json; backbone.path must be a model folder in Hugging Face's format")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise BackboneError(f"{folder}/config.json: not an architecture that transformers knows: {error}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise BackboneError(
            f"{folder}/config.json: model_type {config.model_type} is not an image-text-to-text model, such as llava is"
        )
    return config


def _check_architecture(folder: Path) -> PretrainedConfig:
    config = read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise BackboneError(f"{folder}: no *.safetensors (pickles are not read); save the model with save_pretrained")
    return config


def _load_model(folder: Path, settings: BackboneSettings, config: PretrainedConfig) -> PreTrainedModel:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=settings.attention,
        quantization_config=quantization_of(settings, config),
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, info = loaded
    # transformers only warns and fills the gap with random numbers, which no seed of ours controls.
    absent = sorted(info["missing_keys"])
    if absent:
        raise BackboneError(f"{folder}: incomplete, the weights lack {absent[0]} and {len(absent) - 1} more")
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    keep_bytes(frozen)
    return frozen


def _load_processor(folder: Path) -> ProcessorMixin:
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (ValueError, OSError) as error:
        raise BackboneError(f"{folder}: its processor cannot be loaded: {error}") from error
    # Without a processor's configuration AutoProcessor hands out the bare tokenizer.
    if not isinstance(processor, ProcessorMixin):
        raise BackboneError(f"{folder}: no processor for images and text, only a {type(processor).__name__}")
    return processor
