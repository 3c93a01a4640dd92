"""Where a generated answer ends: at the mark that closes the answers which are learned, whatever a backbone ships with.

A backbone's `generation_config` names the end that its authors trained, which need not be the one of its chat template;
and a mark that is no special token ends nothing by itself. So the mark is read from the template, as for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    reader = AnswerReader(model, processor)
    return [reader.text(tokens) for tokens in tokens_BT.tolist()]


class AnswerReader:
    """Reads generated tokens as an answer, whole or while more of them come."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._tokenizer, self._mark = tokenizer_of(processor), end_mark(processor)
        self._ends = _end_tokens(model, processor, self._mark)

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the answer ends with, or before, the last of these tokens."""
        if not set(self._ends).isdisjoint(tokens):
            return True
        return self._mark.token is None and self._mark.text in self._letters(tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """The answer up to its end."""
        length = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        text = self._letters(tokens[:length])
        return (text if self._mark.token is not None else text.partition(self._mark.text)[0]).strip()

    def certain(self, tokens: Sequence[int]) -> str:
        """What of the text no further token can change: blanks, half letters and half marks at its end are held back.

        So is the last word where the tokenizer tidies blanks, as it may join it with the next one.
        """
        text = self.text(tokens)
        if self._mark.token is None:
            text = text[: len(text) - _beginning_of(self._mark, text)]
        if getattr(self._tokenizer, "clean_up_tokenization_spaces", False):
            text = text[: len(text) - len(text.split()[-1])] if text else text
        return text.rstrip("\ufffd").rstrip()

    def _letters(self, tokens: Sequence[int]) -> str:
        letters: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return letters


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
        keep = 0 if found else _beginning_of(mark, text)
        yield text[: len(text) - keep]
        held = text[len(text) - keep :]
        if found:
            return
    yield held


def _beginning_of(mark: EndMark, text: str) -> int:
    """Letters at the end of a text with which the mark may begin."""
    sizes = range(min(len(text), len(mark.text) - 1), 0, -1)
    return next((size for size in sizes if mark.text.startswith(text[len(text) - size :])), 0)
