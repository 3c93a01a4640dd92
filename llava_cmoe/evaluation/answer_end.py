"""Where a generated answer ends: at the mark that closes the answers which are learned, whatever a backbone ships with.

A backbone's `generation_config` names the end that its authors trained, which need not be the one of its chat template;
and a mark that is no special token ends nothing by itself. So the mark is read from the template, as for training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from llava_cmoe.data.conversation import EndMark, end_mark, tokenizer_of

PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    # What a `generation_config` may hold that keeps an answer from ending, or ends it early.
    "min_length": 0,
    "min_new_tokens": None,
    "no_repeat_ngram_size": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "stop_strings": None,
    "max_time": None,
}
"""Arguments of `generate` that take the likeliest token each time, whatever a backbone ships with."""


def end_arguments(model: Any, processor: Any) -> dict[str, Any]:
    """Arguments of `generate` that end an answer where training ended it, and where the backbone would, too."""
    mark = end_mark(processor)
    arguments: dict[str, Any] = {"eos_token_id": _end_tokens(model, processor, mark)}
    if mark.token is None:
        arguments |= {"stop_strings": [mark.text], "tokenizer": tokenizer_of(processor)}
    return arguments


def answer_texts(tokens_BT: Tensor, model: Any, processor: Any) -> list[str]:
    """Answers up to their ends, in letters; what stands behind an end (padding, a next turn) is none of it."""
    mark, tokenizer = end_mark(processor), tokenizer_of(processor)
    ends = _end_tokens(model, processor, mark)
    texts: list[str] = []
    for tokens in tokens_BT.tolist():
        length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        text: str = tokenizer.decode(tokens[:length], skip_special_tokens=True)
        texts.append((text if mark.token is not None else text.partition(mark.text)[0]).strip())
    return texts


def _end_tokens(model: Any, processor: Any, mark: EndMark) -> list[int]:
    """The mark's token, the tokenizer's end and those of the backbone's `generation_config`."""
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    return sorted({mark.token, tokenizer_of(processor).eos_token_id, *named} - {None})


def until_end(pieces: Iterator[str], mark: EndMark) -> Iterator[str]:
    """Pieces of an answer as they come, without a mark that is written in letters: its beginning is held back."""
    held = ""
    for piece in pieces:
        held += piece
        if mark.token is not None:
            yield held
            held = ""
            continue
        text, found, _ = held.partition(mark.text)
        sizes = range(0 if found else min(len(text), len(mark.text) - 1), -1, -1)
        keep = next(size for size in sizes if size == 0 or mark.text.startswith(text[len(text) - size :]))
        yield text[: len(text) - keep]
        held = text[len(text) - keep :]
        if found:
            return
    yield held
