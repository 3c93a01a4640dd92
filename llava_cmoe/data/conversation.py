r"""From turns to tokens: the backbone's own chat template, and a label mask that lets only answers be learned.

The conversation is rendered once up to each answer (with the generation prompt) and once through it; the text between
the two is the answer. Every segment is tokenised on its own:

    USER: <image>\nWhat is it? ASSISTANT:| a cat</s>|USER: Which colour? ASSISTANT:| red</s>
    -100 -100 ...                          learned    -100 ...                       learned

so training sees, up to each answer, exactly the tokens that generation starts from. Masks that search the token ids for
"ASSISTANT:" (as LLaVA does) depend on how a tokenizer merges letters across borders; this one does not.
Opening and squaring the picture is left to `encoding.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from llava_cmoe.data.rows import MARKER, Turn
from llava_cmoe.settings.base import in_one_line, shown

IGNORED = -100
"""Label of a token that the loss leaves out."""

Processor = ProcessorMixin | PreTrainedTokenizerBase
"""What makes rows into tensors: of images and text, or the plain tokenizer of a model that reads text alone."""


TEMPLATE_FAILS = (
    *(TemplateError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
    *(RuntimeError, MemoryError, ImportError),
)
"""What rendering a chat template raises: it is a program, and may be a wrong one."""


class ChatTemplateError(ValueError):
    """A chat template that cannot be used; the message names whose it is.

    Attributes:
        reason: what is wrong with it, without the name.
    """

    def __init__(self, processor: Any, reason: str) -> None:
        super().__init__(f"chat template of {_name(processor)}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Segment:
    """A piece of the rendered conversation; an answer (with its end token) is learned, the rest is not."""

    text: str
    learned: bool


@dataclass(frozen=True)
class EndMark:
    """What closes an answer: its letters, and its token where it is one of the tokenizer's special ones."""

    text: str
    token: int | None


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; the processor of a model that reads text alone is one."""
    return getattr(processor, "tokenizer", processor)


def to_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as Hugging Face messages with content parts; the newline beside the marker goes with the marker."""
    messages = []
    for turn in turns:
        before, marker, after = turn["text"].partition(MARKER)
        texts = (before.removesuffix("\n"), after.removeprefix("\n")) if marker else (before, "")
        parts: list[dict[str, str]] = [{"type": "text", "text": text} for text in texts if text]
        if marker:
            parts.insert(1 if texts[0] else 0, {"type": "image"})
        messages.append({"role": turn["role"], "content": parts})
    return messages


def encode_sample(
    processor: Any, turns: Sequence[Turn], image: Image.Image | None, max_length: int
) -> dict[str, Tensor]:
    """Tokens and labels of a conversation that ends with an answer.

    Args:
        processor: a Hugging Face processor, or a plain tokenizer for text-only rows.
        turns: alternating user and assistant, with one marker in the first turn iff there is an image.
        image: the picture, already square.
        max_length: longest sample in tokens.

    Returns:
        `input_ids`, `attention_mask` and `labels` of shape (T,), whatever else the processor says about single tokens
        as (T,), and its picture tensors (`pixel_values`, ...) as they are, with a leading batch axis.

    Raises:
        ValueError: the sample is longer than `max_length`, or the chat template cannot be used.
    """
    if turns[-1]["role"] != "assistant":
        raise ValueError("a sample to learn ends with an assistant turn")
    encoded = _encode(processor, turns, image)
    check_length(len(encoded["input_ids"]), max_length)
    return encoded


def encode_prompt(processor: Any, turns: Sequence[Turn], image: Image.Image | None) -> dict[str, Tensor]:
    """Tokens from which an answer is generated: turns that end with the user, and the generation prompt; no labels."""
    if turns[-1]["role"] != "user":
        raise ValueError("a prompt ends with a user turn")
    encoded = _encode(processor, turns, image)
    del encoded["labels"]
    return encoded


def count_tokens(processor: Any, turns: Sequence[Turn], image_tokens: int) -> int:
    """Length of what the turns encode to, without a picture at hand: each marker counts `image_tokens` tokens more."""
    tokenizer, segments = tokenizer_of(processor), split(processor, turns)
    count = len(_encode_first(tokenizer, segments[0].text, None)["input_ids"])
    count += sum(len(_continue(tokenizer, before.text, after.text)) for before, after in pairwise(segments))
    return count + image_tokens * (MARKER in turns[0]["text"])


def check_length(length: int, max_length: int) -> None:
    """Raise a ValueError for a sample that is too long."""
    if length > max_length:
        raise ValueError(f"sample of {length} tokens; at most {max_length} fit (training.max_length)")


def split(processor: Any, turns: Sequence[Turn]) -> list[Segment]:
    """The rendered conversation in alternating prompts and answers."""
    segments: list[Segment] = []
    rendered, tail = "", ""
    for number, turn in enumerate(turns):
        longer = _render(processor, turns[: number + 1])
        if not longer.startswith(rendered):
            raise ChatTemplateError(
                processor,
                f"rendering turn {number} changes the text of earlier turns, so that training and generation would see "
                "different prompts; use a template that only appends",
            )
        piece, rendered = longer[len(rendered) :], longer
        if turn["role"] == "user":
            segments.append(Segment(tail + piece, learned=False))
        else:
            answer, tail = _cut_answer(processor, piece, turn["text"].strip())
            segments.append(Segment(answer, learned=True))
    return segments


def end_mark(processor: Any) -> EndMark:
    """The mark that is learned after every answer, at which generation has to stop."""
    turns: list[Turn] = [{"role": "user", "text": "?"}, {"role": "assistant", "text": "a"}]
    text = split(processor, turns)[-1].text.strip().removeprefix("a").strip()
    tokenizer = tokenizer_of(processor)
    token = tokenizer.get_vocab().get(text) if text in special_tokens(tokenizer) else None
    return EndMark(text, token)


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """Texts that the tokenizer reads as one token of its own, wherever they stand."""
    return frozenset(tokenizer.all_special_tokens) | frozenset(tokenizer.get_added_vocab())


def _render(processor: Any, turns: Sequence[Turn]) -> str:
    messages = to_messages(turns)
    if processor is tokenizer_of(processor):  # templates of text-only models take a string as content
        messages = [{"role": turn["role"], "content": turn["text"]} for turn in turns]
    try:
        rendered: str = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=turns[-1]["role"] == "user"
        )
    except TEMPLATE_FAILS as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" in its line {line}"
        reason = f"rendering fails{where} ({type(error).__name__}: {in_one_line(error)})"
        raise ChatTemplateError(processor, reason) from error
    return rendered


def _cut_answer(processor: Any, piece: str, answer: str) -> tuple[str, str]:
    """Split what the template renders for an answer into what is learned and what belongs to the next prompt.

    Learned are the answer and the end mark after it (`</s>`, `<|im_end|>`). A template without one (the stock one of
    llava-1.5 closes an answer with a blank) would teach a model that never stops: there the end-of-sequence token
    takes the blank's place, which is the Vicuna format that LLaVA was trained with.
    """
    lead = len(piece) - len(piece.lstrip())
    end = lead + len(answer)
    if piece[lead:end] != answer:
        raise ChatTemplateError(
            processor,
            f"does not render the answer {shown(answer)} right after the generation prompt, but {shown(piece)}",
        )
    closing = piece[end:]
    if not closing.strip():
        eos = tokenizer_of(processor).eos_token
        if eos is None:
            reason = "closes no answer, and the tokenizer has no eos_token to do so: no model would learn to stop"
            raise ChatTemplateError(processor, f"{reason}; give it one in tokenizer_config.json")
        return piece[:end] + eos, ""
    mark = closing.split()[0]
    end += closing.index(mark) + len(mark)
    return piece[:end], piece[end:]


def _encode(processor: Any, turns: Sequence[Turn], image: Image.Image | None) -> dict[str, Tensor]:
    if (MARKER in turns[0]["text"]) != (image is not None):
        raise ValueError(f"a picture and the marker {MARKER} in the first user turn belong together")
    tokenizer, segments = tokenizer_of(processor), split(processor, turns)
    encoded = _encode_first(processor, segments[0].text, image)
    first_T = encoded["input_ids"]
    pieces, labels = [first_T], [torch.full_like(first_T, IGNORED)]
    for before, segment in pairwise(segments):
        ids_T = torch.tensor(_continue(tokenizer, before.text, segment.text), dtype=torch.long)
        pieces.append(ids_T)
        labels.append(ids_T if segment.learned else torch.full_like(ids_T, IGNORED))
    rest = sum(map(len, pieces[1:]))
    for key, value in encoded.items():
        if value.shape == first_T.shape:
            encoded[key] = torch.cat([value, value.new_full((rest,), _after_the_prompt(processor, key))])
    encoded["input_ids"], encoded["labels"] = torch.cat(pieces), torch.cat(labels)
    return encoded


def _after_the_prompt(processor: Any, key: str) -> int:
    """What is said about tokens after the first prompt: they are no padding, no picture, and read from left to right.

    A processor that takes the answer as a `suffix` (PaliGemma's) says the last by a token type: the model reads its
    prompt both ways, and would read an answer so, too.
    """
    if key == "token_type_ids":
        return int("suffix" in signature(type(processor).__call__).parameters)
    return int(key == "attention_mask")


def _encode_first(processor: Any, text: str, image: Image.Image | None) -> dict[str, Tensor]:
    """The first prompt, which holds the picture: the processor expands its token. (1, T) outputs lose their batch axis.

    Without a picture the tokenizer does all, as some processors insist on one; no token is a picture's then. A template
    that writes the begin-of-sequence token itself must not get a second one from the tokenizer.
    """
    tokenizer = tokenizer_of(processor)
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    if image is None:
        encoded = dict(tokenizer(text, return_tensors="pt", add_special_tokens=special))
        types = [name for name in processor.model_input_names if name.endswith("token_type_ids")]
        encoded = {name: torch.zeros_like(encoded["input_ids"]) for name in types} | encoded
    else:
        encoded = processor(text=text, images=image, return_tensors="pt", add_special_tokens=special)
    shape = encoded["input_ids"].shape
    return {key: value[0] if value.shape == shape else value for key, value in encoded.items()}


def _continue(tokenizer: Any, before: str, text: str) -> list[int]:
    """Token ids of `text` as it follows `before`.

    SentencePiece tokenizers put a blank before any text that stands alone; read together with what comes before, the
    answer begins as generation would begin it. Where the two would merge into one token, the text stands alone.
    """
    head: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
    both: list[int] = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    if both[: len(head)] == head:
        return both[len(head) :]
    alone: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return alone


def _name(processor: Any) -> str:
    return tokenizer_of(processor).name_or_path or type(processor).__name__
