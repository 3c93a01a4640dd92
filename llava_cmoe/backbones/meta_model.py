"""A backbone's meta_model: the tree of modules that its config describes, on the meta device, without a single weight.

What can be counted is counted there, of a model of any size, in a second and without its files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import PreTrainedModel

from llava_cmoe.backbones.loading import BackboneError, read_config
from llava_cmoe.backbones.model_types import empty_model
from llava_cmoe.backbones.sites import name_sites
from llava_cmoe.pocket.backbone import POCKET_DIR
from llava_cmoe.settings.backbone import BackboneSettings

KNOWN = {"llava-hf/llava-1.5-7b-hf": Path(__file__).parent / "known_configs" / "llava-1.5-7b-hf"}
"""Names on the Hub to folders here that hold their config.json: CLIP ViT-L/14 at 336 pixels and a LLaMA of 7B."""


def meta_model(settings: BackboneSettings) -> PreTrainedModel:
    """The backbone without its weights, in the settings' precision and with their attention.

    Its path may be a folder that holds nothing but config.json. The configs of `KNOWN` need no network.

    Raises:
        BackboneError: no config to be found, or one of a model that answers in no text.
    """
    config = read_config(_folder(settings.path))
    model = empty_model(config, dtype=getattr(torch, settings.dtype), attn_implementation=settings.attention)
    if settings.sites is not None:
        name_sites(model, settings.sites)
    return model


def _folder(path: str) -> Path:
    folder = POCKET_DIR if path == "pocket" else Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path in KNOWN:
        return KNOWN[path]
    try:
        return Path(hf_hub_download(path, "config.json")).parent
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise BackboneError(
            f"backbone.path {path}: no such folder, and no such config on the Hub or in its cache; give a folder that "
            f"holds config.json, or a name that is known here: {', '.join(KNOWN)} ({type(error).__name__})"
        ) from error
