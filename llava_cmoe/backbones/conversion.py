"""LLaVA's own layout as a LLaVA of transformers: an LLM, a projector file and a vision encoder become one folder.

CoIN starts from vicuna-7b-v1.5 and the projector of LLaVA's first stage, which are published apart. Weights are
renamed, never computed with: each keeps its bits and its precision. Only embedding and head grow, by rows for the new
tokens.

The projector's `mm_projector.bin` is the only pickle that this project reads: `torch.load` with `weights_only`, which
builds tensors and calls nothing. All other weights must be safetensors.
"""

from __future__ import annotations

import pickle
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
)

from llava_cmoe.backbones.loading import UNREADABLE, BackboneError
from llava_cmoe.settings.base import in_one_line

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
ROWS = 64
"""The vocabulary is filled up to a multiple of this, as in llava-1.5-7b-hf: 32,002 tokens, 32,064 rows."""
VISION_LAYER = -2
"""LLaVA reads the last but one layer of its vision encoder, and all patches but the class token's."""
PROJECTOR = {"0": "linear_1", "2": "linear_2"}
"""LLaVA-1.5's projector is a list of linear, GELU, linear; transformers names the linears."""
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
CHAT_TEMPLATE = (
    "{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user\\'s questions. ' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ ' ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' if loop.last else '<image>\n' }}"
    "{% else %}{{ part['text'] }}{{ '' if loop.last else '\n' }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% elif add_generation_prompt or not loop.last %}{{ ' ASSISTANT:' }}{% endif %}{% endfor %}"
)
"""Vicuna v1, as LLaVA-1.5 was trained with it: its system sentence, and the end token right behind an answer."""


NO_TENSORS = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, struct.error, OverflowError, MemoryError, SafetensorError),
)
"""What PyTorch's reader of pickles raises for a file that is none, a text for example."""


@dataclass(frozen=True)
class Parts:
    """What is put together: configs, tokenizer, image processor, and tensors under their names in transformers."""

    text: PretrainedConfig
    vision: CLIPVisionConfig
    tokenizer: Any
    images: CLIPImageProcessorPil
    tensors: dict[str, Tensor]


def convert(llm: Path, projector: Path, vision: Path, out: Path) -> None:
    """Write a folder that `backbone.path` may name.

    Args:
        llm: LLaMA in transformers' format, such as vicuna-7b-v1.5: config.json, tokenizer, safetensors.
        projector: `mm_projector.bin` of LLaVA's stage 1 (mlp2x_gelu).
        vision: CLIP or its vision encoder in transformers' format: config.json, preprocessor_config.json, safetensors.
        out: folder to write; it is there whole or not at all.

    Raises:
        BackboneError: a part that is missing, of another architecture or of another width, or a folder in the way.
    """
    if out.exists():
        raise BackboneError(f"{out}: exists already; give a new folder, or delete this one")
    parts = _read(llm, projector, vision)
    partial = out.resolve().with_name(f".{out.resolve().name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    _write(parts, partial)
    partial.rename(out.resolve())


def _read(llm: Path, projector: Path, vision: Path) -> Parts:
    """Read all parts and check that they fit; the LLM's tokens are then one with the image's and padding's."""
    text, whole = _config(llm), _config(vision)
    encoder = whole.vision_config if whole.model_type == "clip" else whole
    if text.model_type != "llama":
        raise BackboneError(f"{llm}/config.json: model_type {text.model_type}; LLaVA-1.5's LLM is a llama")
    if not isinstance(encoder, CLIPVisionConfig):
        raise BackboneError(
            f"{vision}/config.json: model_type {whole.model_type}; LLaVA-1.5's vision encoder is CLIP's"
        )
    tokenizer = _tokenizer(llm)
    linears = _projector(projector, encoder.hidden_size, text.hidden_size)
    text.vocab_size = -(-max(len(tokenizer), text.vocab_size) // ROWS) * ROWS
    text.pad_token_id = tokenizer.pad_token_id
    tensors = {f"language_model.{name}": tensor for name, tensor in _llm_tensors(llm, text.vocab_size).items()}
    tensors |= {f"multi_modal_projector.{name}": tensor for name, tensor in linears.items()}
    tensors |= {f"vision_tower.vision_model.{name}": tensor for name, tensor in _vision_tensors(vision).items()}
    return Parts(text, encoder, tokenizer, _image_processor(vision), tensors)


def _write(parts: Parts, folder: Path) -> None:
    vision: Any = parts.vision  # whose sizes transformers allows to be pairs; a square is one number
    config = LlavaConfig(
        vision_config=vision,
        text_config=parts.text,
        image_token_index=parts.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=VISION_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=parts.text.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=parts.tensors[f"language_model.{EMBEDDINGS[0]}"].dtype,
    )
    config.save_pretrained(folder)
    ids = {f"{kind}_token_id": getattr(parts.tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    GenerationConfig(**ids).save_pretrained(folder)  # type: ignore[no-untyped-call]
    processor = LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=parts.images,
        tokenizer=parts.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    save_torch_state_dict(parts.tensors, folder, metadata={"format": "pt"})


def _config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder}: no config.json; give a model folder in Hugging Face's format")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UNREADABLE as error:
        reason = in_one_line(error)
        raise BackboneError(f"{folder}/config.json: not an architecture that transformers knows: {reason}") from error
    return config


def _tokenizer(llm: Path) -> Any:
    """The LLM's tokenizer with the image's token, then padding's, behind its own: 32000 and 32001 for vicuna."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            llm, trust_remote_code=False, extra_special_tokens={"image_token": IMAGE_TOKEN}
        )
    except UNREADABLE as error:
        raise BackboneError(
            f"{llm}: its tokenizer cannot be loaded; a folder without tokenizer.json needs the packages sentencepiece "
            f"and protobuf: {in_one_line(error)}"
        ) from error
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _image_processor(vision: Path) -> CLIPImageProcessorPil:
    try:
        images: CLIPImageProcessorPil = CLIPImageProcessorPil.from_pretrained(vision)
    except UNREADABLE as error:
        raise BackboneError(
            f"{vision}: no preprocessor_config.json that can be read, which says how pictures are scaled"
        ) from error
    return images


def _projector(file: Path, vision_width: int, text_width: int) -> dict[str, Tensor]:
    """The projector's tensors under their names in transformers, of the widths that the other parts have."""
    given = {name.rpartition("mm_projector.")[2]: tensor for name, tensor in _load_projector(file).items()}
    shapes = {"0": (text_width, vision_width), "2": (text_width, text_width)}
    expected: dict[str, tuple[int, ...]] = {f"{key}.weight": shape for key, shape in shapes.items()}
    expected |= {f"{key}.bias": (text_width,) for key in shapes}
    for name, shape in expected.items():
        if name not in given:
            raise BackboneError(
                f"{file}: lacks model.mm_projector.{name}; give the projector of LLaVA-1.5 (mlp2x_gelu)"
            )
        if tuple(given[name].shape) != shape:
            raise BackboneError(
                f"{file}: model.mm_projector.{name} is {tuple(given[name].shape)}, this LLM (width {text_width}) and "
                f"vision encoder (width {vision_width}) need {shape}; give the projector that was trained for them"
            )
    if strangers := sorted(given.keys() - expected.keys()):
        raise BackboneError(f"{file}: {strangers[0]} is no part of LLaVA-1.5's projector, which is two linears")
    return {f"{PROJECTOR[name[0]]}{name[1:]}": given[name].contiguous() for name in expected}


def _load_projector(file: Path) -> Mapping[str, Tensor]:
    try:
        given = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BackboneError(f"{file}: cannot read the file ({error.strerror})") from error
    except NO_TENSORS as error:
        reason = f"not a file of tensors alone, as torch.save writes them: {in_one_line(error)}"
        raise BackboneError(f"{file}: {reason}; give LLaVA's mm_projector.bin") from error
    if not isinstance(given, dict) or not all(isinstance(tensor, Tensor) for tensor in given.values()):
        raise BackboneError(f"{file}: not tensors by name; give LLaVA's mm_projector.bin")
    return given


def _llm_tensors(llm: Path, num_rows: int) -> dict[str, Tensor]:
    """The LLM's tensors, its embedding and head with as many rows as the new vocabulary.

    A new row is the mean of all: no answer of the LLM's changes, as its logit is the mean logit, which never wins.
    """
    tensors = _safetensors(llm)
    for name in EMBEDDINGS:
        if name in tensors and len(tensors[name]) < num_rows:
            old_VD = tensors[name]
            mean_D = old_VD.float().mean(dim=0).to(old_VD.dtype)
            tensors[name] = torch.cat([old_VD, mean_D.expand(num_rows - len(old_VD), -1)])
    if EMBEDDINGS[0] not in tensors:
        raise BackboneError(f"{llm}: its weights lack {EMBEDDINGS[0]}; give a whole LLaMA")
    return tensors


def _vision_tensors(vision: Path) -> dict[str, Tensor]:
    """The vision encoder's tensors, without those of a whole CLIP's text tower."""
    whole = _safetensors(vision)
    prefix = "vision_model."
    if any(name.startswith(prefix) for name in whole):
        return {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    return whole


def _safetensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BackboneError(
            f"{folder}: no *.safetensors, and other weights are not read; load it with transformers once, and "
            "save_pretrained writes them"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise BackboneError(f"{file}: damaged ({in_one_line(error)}); copy or download it again") from error
    # Positions 0, 1, 2, ... that older versions of transformers stored; newer ones count.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(("position_ids", "inv_freq"))}
