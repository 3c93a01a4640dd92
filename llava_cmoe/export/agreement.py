"""How far an exported model answers as its run does: measured on questions that the run never learned.

Both answer the same prompts greedily; then both read the run's own answers and name the likeliest next token at each
place of them, which one early difference does not multiply. Shape letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from llava_cmoe.data.batches import Batch, batches
from llava_cmoe.data.conversation import IGNORED
from llava_cmoe.data.encoding import Encoding, PromptRows, SampleRows
from llava_cmoe.data.rows import TRAIN_FEATURES
from llava_cmoe.evaluation.answer_end import answer_texts
from llava_cmoe.evaluation.generate import greedy

Answering = Callable[[Batch], AbstractContextManager[Any]]
"""Opened around whatever the model does with a batch."""

At = Callable[[int, int], None]
"""Called with how many rows are done, and how many there are."""


@dataclass(frozen=True)
class Agreement:
    """Shares, from 0 to 1.

    Attributes:
        questions: that were asked.
        answers: share of them with the same answer, to the letter.
        tokens: places in the run's answers, ends included.
        next_tokens: share of them where the same token is the likeliest one.
    """

    questions: int
    answers: float
    tokens: int
    next_tokens: float


@dataclass(frozen=True)
class Questions:
    """What is asked: rows whose first turn is a question, how they are encoded, and what limits an answer."""

    rows: Dataset
    encoding: Encoding
    max_new_tokens: int
    max_length: int
    batch_size: int


@torch.no_grad()
def answers(model: Any, questions: Questions, answering: Answering, at: At) -> list[str]:
    """Greedy answers to all of them, in order."""
    processor, found = questions.encoding.processor, list[str]()
    rows = PromptRows(questions.rows, questions.encoding)
    prompts = batches(rows, processor, questions.batch_size, model.device, side="left")
    for batch in counted(prompts, len(rows), at):
        with answering(batch):
            tokens_BT = model.generate(**batch, **greedy(model, processor, questions.max_new_tokens))
        found += answer_texts(tokens_BT[:, batch["input_ids"].shape[1] :], model, processor)
    return found


@torch.no_grad()
def next_tokens(model: Any, questions: Questions, given: Sequence[str], answering: Answering) -> Tensor:
    """The likeliest token at each place of these answers, of all questions one after another."""
    rows = SampleRows(_conversations(questions.rows, given), questions.encoding, questions.max_length)
    found = list[Tensor]()
    for batch in batches(rows, questions.encoding.processor, questions.batch_size, model.device):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with answering(batch):
            logits_BTV = model(**inputs, use_cache=False).logits
        found.append(logits_BTV[:, :-1].argmax(dim=-1)[batch["labels"][:, 1:] != IGNORED].cpu())
    return torch.cat(found)


def counted(rows: Iterable[Batch], total: int, at: At) -> Iterator[Batch]:
    """The same batches; of each it is said when it is done."""
    done = 0
    for batch in rows:
        yield batch
        done += len(batch["input_ids"])
        at(done, total)


def agreement(said: Sequence[str], others: Sequence[str], likeliest: Tensor, other_likeliest: Tensor) -> Agreement:
    """Of answers and next tokens of both."""
    same = sum(one == other for one, other in zip(said, others, strict=True))
    equal = (likeliest == other_likeliest).double().mean()
    return Agreement(len(said), same / len(said), len(likeliest), float(equal))


def _conversations(rows: Dataset, given: Sequence[str]) -> Dataset:
    """The questions, each with an answer."""

    def conversation(row: dict[str, Any], answer: str) -> dict[str, Any]:
        turns = [row["turns"][0], {"role": "assistant", "text": answer}]
        return {"id": row["id"], "image": row["image"], "turns": turns}

    pairs: Iterator[tuple[dict[str, Any], str]] = zip(rows, given, strict=True)
    return Dataset.from_list([conversation(*pair) for pair in pairs], features=TRAIN_FEATURES)
