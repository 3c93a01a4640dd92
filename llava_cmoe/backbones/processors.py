"""Loads a backbone's processor, and gives it what it lacks: a padding token, a chat template, or a way to do without.

What a processor makes of a row is for `data/conversation.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import (
    PROCESSOR_MAPPING,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    ProcessorMixin,
)

from llava_cmoe.backbones.model_types import sees
from llava_cmoe.data.conversation import Processor, tokenizer_of

VIDEOS = "video_processor"

PALIGEMMA = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}"
    "{% set pictures = message.content | selectattr('type', 'equalto', 'image') | list %}"
    "{{ '<image>' if pictures else (bos_token if loop.first) }}"
    "{% endif %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{{ eos_token if message.role == 'assistant' else ('' if pictures else '\\n') }}"
    "{% endfor %}"
)
"""A picture, the question, a line's end, the answer; beside a picture its processor writes begin and line's end."""

TEMPLATES = {"paligemma": PALIGEMMA}
"""Chat templates of families that are published without one, by the type of the model."""


class TokenizersErrors:
    """Inside, what the tokenizers library raises for a file of its own, `Exception` itself, is a ValueError."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Raise it as a ValueError; any other error passes."""
        if kind is Exception:
            raise ValueError(f"tokenizer.json: {error}") from error


def processor_in(folder: Path, config: PretrainedConfig) -> Processor:
    """The processor in a model's folder: a tokenizer where the model reads text alone.

    Raises:
        ValueError: there is none for images and text, or no chat template.
        OSError: a file of it is missing.
        ImportError: it needs a package that is not installed.
    """
    processor: Any
    if sees(config):
        processor = _of_images(folder, config)
        # Without a processor's configuration AutoProcessor hands out the bare tokenizer.
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(f"no processor for images and text, only a {type(processor).__name__}")
    else:
        processor = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token is None:  # what fills short rows is masked, and no label
        tokenizer.pad_token = tokenizer.eos_token
    processor.chat_template = processor.chat_template or tokenizer.chat_template or TEMPLATES.get(config.model_type)
    if processor.chat_template is None:
        raise ValueError("no chat template; put one into the folder, as chat_template.jinja")
    return cast(Processor, processor)


def without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same kind of processor without its part for videos, which needs torchvision; no row holds a video."""

    class WithoutVideos(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != VIDEOS]

    WithoutVideos.__name__ = kind.__name__  # it is saved under this name
    return WithoutVideos


def _of_images(folder: Path, config: PretrainedConfig) -> Any:
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (ValueError, OSError, ImportError):
        kind: Any = PROCESSOR_MAPPING.get(type(config), None)
        if kind is None or VIDEOS not in kind.get_attributes():
            raise
    return without_videos(kind).from_pretrained(folder, trust_remote_code=False)
