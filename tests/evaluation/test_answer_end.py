"""The mark that is taught ends generation, in every family and template and whatever the backbone ships with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llava_cmoe.data.conversation import IGNORED, EndMark, encode_sample, end_mark, tokenizer_of
from llava_cmoe.data.encoding import Encoding, PromptRows
from llava_cmoe.data.rows import EVAL_FEATURES, Turn
from llava_cmoe.evaluation.answer_end import AnswerReader, until_end
from llava_cmoe.evaluation.generate import EvalModel, EvalSet, Route, answer_batch
from llava_cmoe.methods.base import DeferredLocation

ANSWER, BEHIND = "a cat", "x cat"
LONGEST = 24


@dataclass
class Anyone:
    """A method that changes nothing."""

    @contextmanager
    def answering(self, batch: Mapping[str, Tensor], task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        yield lambda: None


def taught(processor: Any, question: str, answer: str) -> list[int]:
    """The tokens that training teaches after a question."""
    turns: list[Turn] = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    sample = encode_sample(processor, turns, None, max_length=512)
    return sample["input_ids"][sample["labels"] != IGNORED].tolist()


def scripted(model: Any, scripts: list[list[int]]) -> Any:
    """Let a model say these tokens, one list per row of the batch, then letters for ever."""
    steps = [0]

    def say(_: Any, __: Any, logits_BTV: Tensor) -> Tensor:
        said_BTV = torch.zeros_like(logits_BTV)
        for row, script in enumerate(scripts):
            said_BTV[row, -1, script[steps[0] % len(script)]] = 100.0
        steps[0] += 1
        return said_BTV

    return model.get_output_embeddings().register_forward_hook(say)


def answers_of(made: families.Tiny, scripts: list[list[int]]) -> tuple[list[str], int]:
    """What an evaluation reads, and after how many tokens generation stopped."""
    row = {"image": None, "answer": "-", "answers": [], "choices": [], "box": [], "size": []}
    rows = [{"id": str(n), **row, "turns": [{"role": "user", "text": "What?"}]} for n in range(len(scripts))]
    prompts = PromptRows(Dataset.from_list(rows, features=EVAL_FEATURES), Encoding(made.processor))
    questions = EvalSet(tuple(str(n) for n in range(len(scripts))), ("What?",) * len(scripts), prompts, LONGEST)
    forward, passes = scripted(made.model, scripts), [0]
    counted = made.model.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    try:
        eval_model: Any = EvalModel(Anyone(), made.model, made.processor)
        said = answer_batch(eval_model, questions, range(len(scripts)), Route("oracle", 0, 1, 0))
    finally:
        forward.remove()
        counted.remove()
    return [answer.text for answer in said], passes[0]


SHIPPED: dict[str, dict[str, Any]] = {
    "nothing": {"eos_token_id": None},
    "another end": {"eos_token_id": 5},
    "other ends": {"eos_token_id": [5, 6]},
    "a least length": {"min_new_tokens": 20, "min_length": 60},
    "no repeats": {"no_repeat_ngram_size": 1, "repetition_penalty": 9.0},
    "sampling": {"do_sample": True, "temperature": 9.0, "num_return_sequences": 2},
    "a string": {"stop_strings": ["cat"]},
}


@pytest.mark.parametrize("shipped", SHIPPED)
@pytest.mark.parametrize("kind", [*families.WITH_IMAGES, "llama"])
def test_an_answer_ends_at_the_mark_that_is_taught(kind: str, shipped: str) -> None:
    made = families.make(kind)
    ending = tokenizer_of(made.processor).convert_tokens_to_ids(end_mark(made.processor).text)
    more = {"suppress_tokens": [ending], "begin_suppress_tokens": [ending]} if shipped == "a least length" else {}
    for name, value in {**SHIPPED[shipped], **more}.items():
        setattr(made.model.generation_config, name, value)
    behind = tokenizer_of(made.processor)(BEHIND, add_special_tokens=False)["input_ids"]
    short, long = (taught(made.processor, "What?", answer) for answer in ("a", ANSWER))
    texts, passes = answers_of(made, [short + behind * 9, long + behind * 9, long])
    assert texts == ["a", ANSWER, ANSWER]
    assert passes == len(long)  # nobody waited for the longest answer


TEMPLATES = {
    "letters": "###",
    "letters of a tag": "<end>",
    "letters with a line after": "<|end|>\n",
    "a line, then the mark": "\n###\n",
    "special": "<|im_end|>\n",
    "nothing": "\n",
    "eos": "</s>",
}


@pytest.mark.parametrize("closing", TEMPLATES)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_onevision"])
def test_a_template_may_end_answers_as_it_likes(kind: str, closing: str) -> None:
    made = families.make(kind)
    made.processor.chat_template = families._template("USER: ", "<image>", "\n", "BOT:", TEMPLATES[closing])
    behind = tokenizer_of(made.processor)(BEHIND, add_special_tokens=False)["input_ids"]
    short, long = (taught(made.processor, "What?", answer) for answer in ("a", ANSWER))
    texts, passes = answers_of(made, [short + behind * 9, long + behind * 9])
    assert texts == ["a", ANSWER]
    assert passes == len(long)


@given(st.text("ab#", max_size=12), st.text("#ab", max_size=6), st.lists(st.integers(0, 20)))
def test_a_stream_stops_before_a_mark_of_letters_however_it_is_cut(text: str, rest: str, cuts: list[int]) -> None:
    whole = f"{text}##{rest}"
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[start:end] for start, end in pairwise(places)]
    assert "".join(until_end(iter(pieces), EndMark("##", None))) == whole.partition("##")[0]
    assert "".join(until_end(iter(pieces), EndMark("##", 3))) == whole
    plain = whole.replace("##", "#")
    while "##" in plain:
        plain = plain.replace("##", "#")
    assert "".join(until_end(iter(plain), EndMark("##", None))) == plain


@pytest.mark.parametrize("mark", [EndMark("##", None), EndMark("</s>", 2)])
@given(st.lists(st.integers(4, 380), max_size=12), st.text("a# \u00e9\u65e5\U0001f600", max_size=6))
def test_what_is_certain_of_an_answer_is_never_taken_back(tiny_processor, mark: EndMark, some: list[int], text: str):
    """Tokens may be halves of letters; the two marks are one of letters and one of the tokenizer."""
    tokenizer = tiny_processor.tokenizer
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2))
    reader = AnswerReader(model, tiny_processor)
    reader._mark = mark
    tokens = [token for token in (*some, *tokenizer(text, add_special_tokens=False)["input_ids"])]
    whole = [reader.text(tokens[:end]) for end in range(len(tokens) + 1)]
    certain = [reader.certain(tokens[:end]) for end in range(len(tokens) + 1)]
    assert all(later.startswith(early) for place, early in enumerate(certain) for later in whole[place:])
    assert reader.ended([*tokens, 2]) and reader.text([*tokens, 2, 9]) == whole[-1]
    assert reader.ended(tokens) == (mark.token is None and mark.text in tokenizer.decode(tokens))
