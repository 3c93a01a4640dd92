"""Step one of an evaluation: the model answers a task's questions, and the answers are written down, not judged.

What differs from a plain loop: batches are fixed by the rows' order and the batch size alone (batch b belongs to
process b modulo the number of processes), and answers are appended batch by batch. So one process or two, killed or
not, the same batches are computed and the same bytes end up in the answers file. A batch that a kill cut in two is
computed again whole, because the last bits of its logits may depend on who shares the batch; for the same reason an
evaluation that goes on with another batch size begins the unfinished file anew. A sample that cannot be answered is
asked again alone, then recorded as failed: a broken picture costs neither its batch mates nor the run.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_cmoe.data.batches import on_device
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.data.encoding import PromptRows
from llava_cmoe.evaluation.answer_end import PLAIN, answer_texts, end_arguments
from llava_cmoe.evaluation.log import Answer, read_answers, write_answers
from llava_cmoe.methods.base import DeferredLocation
from llava_cmoe.records import Located

logger = logging.getLogger(__name__)

RouteName = Literal["located", "oracle", "random"]
FAILURES = (ValueError, RuntimeError, MemoryError)
"""What one sample can cause: a picture that cannot be read, a prompt that the model cannot take, too little memory."""

Progress = Callable[[int, int], None]
"""Called after every batch with the samples done and all samples, both of this process."""


class Answering(Protocol):
    """What an evaluation needs of a method."""

    def answering(
        self, batch: Mapping[str, Tensor], task_B: Tensor | None = None
    ) -> AbstractContextManager[DeferredLocation]:
        """Answer these prompts while open, each with the routers of its given task, or of the one it is located at."""
        ...


class Processes(Protocol):
    """The processes that share the work: an `accelerate.PartialState` or `Accelerator`."""

    @property
    def process_index(self) -> int:
        """From 0."""
        ...

    @property
    def num_processes(self) -> int:
        """All of them."""
        ...

    @property
    def is_main_process(self) -> bool:
        """Whether this one merges what all have written."""
        ...

    def wait_for_everyone(self) -> None:
        """Return when every process has called this."""
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
    """

    name: RouteName
    task_index: int
    num_known: int
    seed: int

    def given_tasks(self, ids: Sequence[str]) -> Tensor | None:
        """Task per sample, drawn from (seed, id) alone and never from the place in the batch; None if to be located."""
        match self.name:
            case "located":
                return None
            case "oracle":
                return torch.full((len(ids),), self.task_index)
            case "random":
                draws = (hashlib.sha256(f"{self.seed}:{sample_id}".encode()).digest() for sample_id in ids)
                return torch.tensor([int.from_bytes(draw) % self.num_known for draw in draws])


def generate_answers(
    eval_model: EvalModel,
    questions: EvalSet,
    route: Route,
    path: Path,
    *,
    batch_size: int,
    processes: Processes,
    progress: Progress | None = None,
) -> None:
    """Answer every question and write `path`, going on where an earlier call was interrupted; all processes call this.

    While the work goes on, process p appends to `path` with the suffix `.{batch size}.{p}.part`. The main process then
    merges these in the questions' order, under the final name, in one step. A complete file is left as it is.

    Raises:
        ValueError: the file, or what is left of an interrupted one, holds other ids than the questions; or not one of
            several questions can be answered, so that it is no question's fault (also RuntimeError).
    """
    if not path.exists():
        eval_model.model.eval()
        answered = {answer.id for part in _parts(path, batch_size) for answer in read_answers(part)}
        processes.wait_for_everyone()  # everyone has read before anyone writes
        _refuse_foreign(answered, questions, path)
        size = len(questions.ids)
        batches = [range(start, min(start + batch_size, size)) for start in range(0, size, batch_size)]
        mine = batches[processes.process_index :: processes.num_processes]
        num_done, num_mine = 0, sum(map(len, mine))
        held: list[Answer] = []  # failures, until one question is answered: they may all be one and the same
        works = bool(answered)
        with _open_to_append(path.with_name(f"{path.name}.{batch_size}.{processes.process_index}.part")) as stream:
            for batch in mine:
                if not answered.issuperset(questions.ids[index] for index in batch):
                    held += answer_or_record(eval_model, questions, batch, route)
                    works = works or any(answer.failed is None for answer in held)
                    if works:
                        _append(stream, held)
                        held = []
                    elif len(held) > 1:
                        raise RuntimeError(f"none of the first questions can be answered: {held[-1].failed}")
                num_done += len(batch)
                if progress:
                    progress(num_done, num_mine)
            _append(stream, held)
        processes.wait_for_everyone()
        if processes.is_main_process:
            _merge(questions, path, batch_size)
    elif processes.is_main_process:
        _finish(questions, path)
    processes.wait_for_everyone()  # nobody reads the file before it is there


def answer_or_record(eval_model: EvalModel, questions: EvalSet, batch: Sequence[int], route: Route) -> list[Answer]:
    """Answer a batch; if that fails, each of its samples alone, recording why of those that fail again.

    Raises:
        ValueError, RuntimeError, MemoryError: not one of several samples can be answered, so it is no sample's fault.
    """
    try:
        return answer_batch(eval_model, questions, batch, route)
    except FAILURES as error:
        logger.warning("a batch of %d samples failed, they are asked one by one: %s", len(batch), error)
    answers, failure = [], None
    for index in batch:
        try:
            answers += answer_batch(eval_model, questions, [index], route)
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
    """Locate every prompt once and decode greedily, left-padded, until every answer has ended."""
    tokenizer = tokenizer_of(eval_model.processor)
    ids = [questions.ids[index] for index in batch]
    collate = Collator(tokenizer.pad_token_id, "left")
    prompts = on_device(collate([questions.prompts[index] for index in batch]), eval_model.model.device)
    task_B = route.given_tasks(ids)
    with eval_model.method.answering(prompts, task_B) as location:
        tokens_BT = eval_model.model.generate(
            **prompts, **greedy(eval_model.model, eval_model.processor, questions.max_new_tokens)
        )
    texts = answer_texts(tokens_BT[:, prompts["input_ids"].shape[1] :], eval_model.model, eval_model.processor)
    chosen = _choices(location(), len(ids))
    return [
        Answer(sample_id, text, task, score, questions.texts[index])
        for index, sample_id, text, (task, score) in zip(batch, ids, texts, chosen, strict=True)
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


def greedy(model: PreTrainedModel, processor: Any, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate`: the likeliest token each time until the end, whatever sampling a backbone ships with."""
    return {
        **PLAIN,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer_of(processor).pad_token_id,
        **end_arguments(model, processor),
    }


def _parts(path: Path, batch_size: int | Literal["*"]) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.{batch_size}.*.part"))


def _open_to_append(part: Path) -> BinaryIO:
    """Open a part behind its last complete line; what a kill left of the next one is cut off."""
    part.parent.mkdir(parents=True, exist_ok=True)
    stream = part.open("a+b")
    stream.seek(0)
    stream.truncate(stream.read().rfind(b"\n") + 1)
    return stream


def _append(stream: BinaryIO, answers: Sequence[Answer]) -> None:
    stream.write(b"".join(answer.to_line() for answer in answers))
    stream.flush()
    os.fsync(stream.fileno())


def _refuse_foreign(found: set[str], questions: EvalSet, path: Path) -> None:
    foreign = sorted(found.difference(questions.ids))
    if foreign:
        raise ValueError(f"{path}: holds an answer to {foreign[0]!r}, which is not asked; delete it to generate again")


def _merge(questions: EvalSet, path: Path, batch_size: int) -> None:
    """Write the answers of all parts in the questions' order; of a batch computed twice the later answers stand."""
    by_id = {answer.id: answer for part in _parts(path, batch_size) for answer in read_answers(part)}
    write_answers(path, [by_id[sample_id] for sample_id in questions.ids])
    _finish(questions, path)


def _finish(questions: EvalSet, path: Path) -> None:
    """Check a complete file and remove its parts, which a kill right after merging leaves behind."""
    _refuse_foreign({answer.id for answer in read_answers(path)}, questions, path)
    for part in _parts(path, "*"):
        part.unlink()
