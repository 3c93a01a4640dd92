"""Step one of an evaluation: the model answers a task's questions, and the answers are written down, not judged.

What differs from a plain loop: what is known (`known.py`) is taken over, and what is left is shared out in batches that
neither the number of processes nor a kill changes (`parts.py`). What is left depends only on the answers files that are
complete when a file is begun and, on the located route, on where all prompts are located, in batches fixed likewise. So
one process or two, killed or not, the same bytes end up in the answers file. A sample that cannot be answered is asked
again alone, then recorded as failed: a broken picture costs neither its batch mates nor the run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_cmoe.data.batches import on_device
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.data.encoding import PromptRows
from llava_cmoe.evaluation.answer_end import PLAIN, answer_texts, end_arguments
from llava_cmoe.evaluation.log import Answer, LogError, read_answers, write_answers
from llava_cmoe.evaluation.parts import Processes, read_parts, remove_parts, share_out
from llava_cmoe.methods.base import DeferredLocation
from llava_cmoe.records import Located
from llava_cmoe.settings.base import shown

logger = logging.getLogger(__name__)

RouteName = Literal["located", "oracle", "random"]
FAILURES = (ValueError, RuntimeError, MemoryError)
"""What one sample can cause: a picture that cannot be read, a prompt that the model cannot take, too little memory."""

Known = Mapping[tuple[str, int | None], Answer]
"""Answers by id and by the task whose routers gave them, None where tasks make no difference; without a location."""

AskBatch = Callable[[Sequence[int]], list[Answer]]
"""Called with the places of some questions; answers them all."""

Progress = Callable[[str, int, int], None]
"""Called after every batch with the route, or `locating`, the samples done and all samples, both of this process."""


class Answering(Protocol):
    """What an evaluation needs of a method; `Method` says more."""

    @property
    def locates(self) -> bool:
        """Whether the task that is given or located makes a difference."""
        ...

    @property
    def answers_by_task(self) -> bool:
        """Whether prompt and task decide an answer for good."""
        ...

    def locate(self, batch: Mapping[str, Tensor]) -> Located | None:
        """The task of each prompt, without answering."""
        ...

    def answering(
        self, batch: Mapping[str, Tensor], task_B: Tensor | None = None
    ) -> AbstractContextManager[DeferredLocation]:
        """Answer these prompts while open, each with the routers of its given task, or of the one it is located at."""
        ...


@dataclass(frozen=True)
class EvalModel:
    """Who is examined: the model with a method's experts in it, and the processor that goes with it."""

    method: Answering
    model: Any
    processor: Any


@dataclass(frozen=True)
class EvalSet:
    """One task's evaluation rows in their fixed order.

    Attributes:
        ids: the rows' ids.
        texts: the user's turns.
        prompts: the encoded prompts.
        max_new_tokens: longest answer.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    prompts: PromptRows
    max_new_tokens: int


@dataclass(frozen=True)
class Route:
    """Whose routers answer: the located task's, the true task's (oracle), or a random known task's.

    Attributes:
        name: which of the three.
        task_index: the true task.
        num_known: tasks learned so far; a random route draws among them.
        seed: of the random draw.
        found: id to task of the prompts that were located before they are answered.
    """

    name: RouteName
    task_index: int
    num_known: int
    seed: int
    found: Mapping[str, int | None] = field(default_factory=dict)

    def task_of(self, sample_id: str) -> int | None:
        """The sample's task, drawn from (seed, id) alone and never from the place in a batch; None if to be located."""
        match self.name:
            case "located":
                return self.found.get(sample_id)
            case "oracle":
                return self.task_index
            case "random":
                draw = hashlib.sha256(f"{self.seed}:{sample_id}".encode()).digest()
                return int.from_bytes(draw) % self.num_known

    def given_tasks(self, ids: Sequence[str]) -> Tensor | None:
        """Task per sample (B,); None if the method is to locate them as it answers."""
        tasks = [self.task_of(sample_id) for sample_id in ids]
        return None if None in tasks else torch.tensor(tasks)


def generate_answers(
    eval_model: EvalModel,
    questions: EvalSet,
    route: Route,
    path: Path,
    *,
    batch_size: int,
    processes: Processes,
    known: Callable[[], Known] = dict,
    progress: Progress = lambda *_: None,
) -> None:
    """Answer every question and write `path`, going on where an earlier call was interrupted; all processes call this.

    With a method that answers by task, all prompts of a located route are located first; with any other they are
    located as they are answered. What is not known is asked, and the main process writes all answers in the questions'
    order, under the final name, in one step. A complete file is left as it is, and `known` is not called for it.

    Raises:
        ValueError: the file, or what is left of an interrupted one, holds other ids than the questions; or not one of
            several questions can be answered, so that it is no question's fault (also RuntimeError).
    """
    if not path.exists():
        eval_model.model.eval()
        _refuse_foreign(read_parts(path, batch_size), questions, path)
        ids, method = questions.ids, eval_model.method
        share = partial(share_out, ids=ids, batch_size=batch_size, processes=processes)
        verdicts: Mapping[str, Answer] = {}
        if route.name == "located" and method.answers_by_task:
            locate = partial(answer_or_record, partial(locate_batch, eval_model, questions), questions)
            beside = path.with_name(f"{path.name}.locating")
            share(beside, longest_first(questions.texts), locate, progress=partial(progress, "locating"))
            verdicts = read_parts(beside, batch_size)
            route = replace(route, found={sample_id: verdict.located for sample_id, verdict in verdicts.items()})
        given = known()
        keys = [(sample_id, route.task_of(sample_id) if method.locates else None) for sample_id in ids]
        answers = {key[0]: given[key] for key in keys if key in given}
        answers |= {sample_id: verdict for sample_id, verdict in verdicts.items() if verdict.failed is not None}
        left = [index for index in longest_first(questions.texts) if ids[index] not in answers]
        answer = partial(answer_or_record, partial(answer_batch, eval_model, questions, route=route), questions)
        share(path, left, answer, progress=partial(progress, route.name))
        if processes.is_main_process:
            answers |= read_parts(path, batch_size)
            write_answers(path, [_with_verdict(answers[sample_id], verdicts.get(sample_id)) for sample_id in ids])
    if processes.is_main_process:
        _refuse_foreign((answer.id for answer in read_answers(path)), questions, path)
        remove_parts(path)
    processes.wait_for_everyone()  # nobody reads the file before it is there


def longest_first(texts: Sequence[str]) -> list[int]:
    """Places of texts by falling length: batch mates need little padding, and one too long for memory fails first."""
    return sorted(range(len(texts)), key=lambda place: -len(texts[place]))


def answer_or_record(ask: AskBatch, questions: EvalSet, batch: Sequence[int]) -> list[Answer]:
    """Answer a batch; if that fails, each of its samples alone, recording why of those that fail again.

    Raises:
        ValueError, RuntimeError, MemoryError: not one of several samples can be answered, so it is no sample's fault.
    """
    try:
        return ask(batch)
    except FAILURES as error:
        logger.warning("a batch of %d samples failed, they are asked one by one: %s", len(batch), error)
    answers, failure = [], None
    for index in batch:
        try:
            answers += ask([index])
        except FAILURES as error:
            failure, sample_id = error, questions.ids[index]
            logger.warning("%s cannot be answered and counts as wrong: %s", sample_id, error)
            # Of an error of torch's only the kind: its message may tell addresses or bytes, another each time.
            reason = str(error) if isinstance(error, ValueError) else type(error).__name__
            answers.append(Answer(sample_id, "", None, None, questions.texts[index], failed=reason))
    if failure is not None and len(batch) > 1 and all(answer.failed is not None for answer in answers):
        raise failure
    return answers


@torch.no_grad()
def answer_batch(eval_model: EvalModel, questions: EvalSet, batch: Sequence[int], route: Route) -> list[Answer]:
    """Locate every prompt once, unless its task is given, and decode greedily until every answer has ended."""
    prompts = _prompts(eval_model, questions, batch)
    task_B = route.given_tasks([questions.ids[index] for index in batch])
    with eval_model.method.answering(prompts, task_B) as location:
        tokens_BT = eval_model.model.generate(
            **prompts, **greedy(eval_model.model, eval_model.processor, questions.max_new_tokens)
        )
    texts = answer_texts(tokens_BT[:, prompts["input_ids"].shape[1] :], eval_model.model, eval_model.processor)
    return _answers(questions, batch, texts, location())


@torch.no_grad()
def locate_batch(eval_model: EvalModel, questions: EvalSet, batch: Sequence[int]) -> list[Answer]:
    """Locate every prompt and answer none: the texts stay empty."""
    located = eval_model.method.locate(_prompts(eval_model, questions, batch))
    assert located is not None, "a method that answers by task"
    return _answers(questions, batch, [""] * len(batch), located)


def _prompts(eval_model: EvalModel, questions: EvalSet, batch: Sequence[int]) -> dict[str, Tensor]:
    """Left-padded, on the model's device."""
    collate = Collator(tokenizer_of(eval_model.processor).pad_token_id, "left")
    return on_device(collate([questions.prompts[index] for index in batch]), eval_model.model.device)


def _answers(questions: EvalSet, batch: Sequence[int], texts: Sequence[str], located: Located | None) -> list[Answer]:
    chosen = _choices(located, len(batch))
    return [
        Answer(questions.ids[index], text, task, score, questions.texts[index])
        for index, text, (task, score) in zip(batch, texts, chosen, strict=True)
    ]


def _choices(located: Located | None, num_samples: int) -> list[tuple[int | None, float | None]]:
    """Chosen task and its score per sample; no score where the base model was chosen, neither where nobody located."""
    if located is None or located.score_BN is None:
        return [(None, None)] * num_samples
    score_BN = located.score_BN.tolist()
    return [
        (task, scores[task] if task >= 0 else None)
        for task, scores in zip(located.task_B.tolist(), score_BN, strict=True)
    ]


def _with_verdict(answer: Answer, verdict: Answer | None) -> Answer:
    """The answer, and beside it where its prompt was located before; what failed was located nowhere."""
    if verdict is None or answer.failed is not None:
        return answer
    return replace(answer, located=verdict.located, score=verdict.score)


def greedy(model: PreTrainedModel, processor: Any, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate`: the likeliest token each time until the end, whatever sampling a backbone ships with."""
    return {
        **PLAIN,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer_of(processor).pad_token_id,
        **end_arguments(model, processor),
    }


def _refuse_foreign(found: Iterable[str], questions: EvalSet, path: Path) -> None:
    foreign = sorted(set(found).difference(questions.ids))
    if foreign:
        raise LogError(
            f"{path}: holds an answer to {shown(foreign[0])}, which is not asked; delete it to generate again"
        )
