"""Loads the frozen backbone: any Hugging Face model that reads images and text, or text alone, and its processor.

Where experts may live in it is for `sites.py`, what its processor lacks for `processors.py`; the pocket backbone's
making is for `pocket.py`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from llava_cmoe.backbones.chat_template import check_chat_template, file_of_template
from llava_cmoe.backbones.model_types import auto_model, empty_model, sees, writes
from llava_cmoe.backbones.processors import TokenizersErrors, processor_in
from llava_cmoe.backbones.quantization import keep_bytes, quantization_of
from llava_cmoe.backbones.sites import ffn_sites, linear_sites, name_sites
from llava_cmoe.data.conversation import ChatTemplateError, Processor
from llava_cmoe.pocket.backbone import POCKET_DIR
from llava_cmoe.provenance.fingerprints import fingerprint_files
from llava_cmoe.settings.backbone import BackboneSettings, SiteSettings
from llava_cmoe.settings.base import RecipeError, in_one_line
from llava_cmoe.settings.recorded import RecordedBackbone

FILE_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
"""What defines a backbone: configuration, tokenizer, chat template, weights. Pickled weights are never read."""


UNREADABLE = (
    *(ValueError, OSError, ImportError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError),
    StrictDataclassError,
)
"""What transformers raises for a configuration, tokenizer or processor that it cannot make sense of."""


MISMATCH = "the weights have other sizes"
"""What transformers says in a table."""


class BackboneError(ValueError):
    """A backbone that cannot be used; the message names the path and the fix."""


@dataclass(frozen=True)
class Backbone:
    """A frozen model in eval mode, its processor, the sha256 over the files both were read from, its quantization.

    The processor of a model that reads text alone is its tokenizer.
    """

    model: PreTrainedModel
    processor: Processor
    fingerprint: str
    quantization: str


def load_backbone(settings: BackboneSettings) -> Backbone:
    """Load, freeze and fingerprint the backbone; it stays on the CPU, but a quantized one goes where it will compute.

    Raises:
        BackboneError: no such folder or model, an architecture that answers in no text, no safetensors, weights that do
            not fit the configuration, no processor, no chat template, an attention kernel that is not installed or not
            the model's, or sites that the model does not have.
    """
    if settings.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise BackboneError(
            "backbone.attention flash_attention_2 needs the package flash-attn and a CUDA GPU, and one of them is not "
            "here; install flash-attn, or set backbone.attention: sdpa"
        )
    folder = _folder(settings)
    config = _check_architecture(folder)
    processor = _load_processor(folder, config)
    if settings.sites is not None:
        _check_sites(folder, config, settings.sites)
    files = [path for pattern in FILE_PATTERNS for path in folder.glob(pattern)]
    return Backbone(
        model=_load_model(folder, settings, config),
        processor=processor,
        fingerprint=fingerprint_files(files, root=folder),
        quantization=settings.quantization,
    )


def sharing_weights(backbone: Backbone) -> Backbone:
    """The same backbone in a module tree of its own, for one more method: its tensors are the very same objects.

    To be called before a method edits the first one's tree.
    """
    tensors = chain(backbone.model.parameters(), backbone.model.buffers())
    return replace(backbone, model=deepcopy(backbone.model, {id(tensor): tensor for tensor in tensors}))


def load_processor(path: str) -> Processor:
    """The processor alone, for what needs no weights; `path` and errors as for `load_backbone`."""
    folder = _folder(BackboneSettings(path=path))
    return _load_processor(folder, read_config(folder))


def reads_images(settings: BackboneSettings) -> bool:
    """Whether the backbone takes pictures, from its configuration alone; errors as for `load_backbone`."""
    return sees(read_config(_folder(settings)))


def _folder(settings: BackboneSettings) -> Path:
    """The folder that holds the backbone's files, fetched from the Hub (or its cache) for a model's name.

    A name that only a run's record gives is looked for in the cache alone.
    """
    path, is_asked = settings.path, not isinstance(settings, RecordedBackbone)
    folder = POCKET_DIR if path == "pocket" else Path(path).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(path, allow_patterns=list(FILE_PATTERNS), local_files_only=not is_asked))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        where = "and no such model on the Hub or in its cache; give the folder that holds config.json"
        if not is_asked:
            where = f"and not in the Hub's cache; if you trust what the run's record names, `hf download {path}` first"
        raise BackboneError(f"backbone.path {path}: no such folder, {where} ({type(error).__name__})") from error


def read_config(folder: Path) -> PretrainedConfig:
    """What a folder's config.json describes.

    Raises:
        BackboneError: no such file, or an architecture that answers in no text.
    """
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder}: no config.json; backbone.path must be a model folder in Hugging Face's format")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UNREADABLE as error:
        reason = in_one_line(error)
        raise BackboneError(f"{folder}/config.json: not an architecture that transformers knows: {reason}") from error
    if not writes(config):
        raise BackboneError(
            f"{folder}/config.json: model_type {config.model_type} is neither an image-text-to-text model, such as "
            "llava is, nor a causal language model, such as llama is"
        )
    return config


def _check_architecture(folder: Path) -> PretrainedConfig:
    config = read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise BackboneError(f"{folder}: no *.safetensors (pickles are not read); save the model with save_pretrained")
    return config


def _check_sites(folder: Path, config: PretrainedConfig, sites: SiteSettings) -> None:
    """Look for the recipe's names before the weights are read."""
    empty = empty_model(config)
    name_sites(empty, sites)
    try:
        ffn_sites(empty)
        linear_sites(empty)
    except RecipeError as error:
        raise BackboneError(f"{folder}: {error}") from error


def _load_model(folder: Path, settings: BackboneSettings, config: PretrainedConfig) -> PreTrainedModel:
    try:
        model, info = auto_model(config).from_pretrained(
            folder,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=settings.attention,
            quantization_config=quantization_of(settings, config),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except SafetensorError as error:
        reason = in_one_line(error)
        raise BackboneError(f"{folder}: its weights are damaged ({reason}); copy or download them again") from error
    except torch.OutOfMemoryError:
        raise
    except (*UNREADABLE, RuntimeError) as error:
        if "attention implementation" in str(error):
            raise BackboneError(f"{folder}: set backbone.attention to eager ({in_one_line(error)})") from error
        is_size = "ignore_mismatched_sizes" in str(error)
        reason = MISMATCH if is_size else f"{type(error).__name__}: {in_one_line(error)}"
        raise BackboneError(
            f"{folder}: config.json and weights do not make a model ({reason}); copy or download both again"
        ) from error
    # transformers only warns and fills the gap with random numbers, which no seed of ours controls.
    absent = sorted(info["missing_keys"])
    if absent:
        raise BackboneError(f"{folder}: incomplete, the weights lack {absent[0]} and {len(absent) - 1} more")
    if settings.sites is not None:
        name_sites(model, settings.sites)
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    keep_bytes(frozen)
    return frozen


def _load_processor(folder: Path, config: PretrainedConfig) -> Processor:
    try:
        with TokenizersErrors():
            processor = processor_in(folder, config)
    except UNREADABLE as error:
        raise BackboneError(f"{folder}: its processor cannot be used: {in_one_line(error)}") from error
    try:
        check_chat_template(processor)
    except ChatTemplateError as error:
        raise BackboneError(
            f"{file_of_template(folder)}: its chat template cannot be used: {error.reason}; mend it, or take "
            "the file that the model was published with"
        ) from error
    return processor
