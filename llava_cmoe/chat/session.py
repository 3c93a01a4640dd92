"""Asks a run about one picture, or none: locates the question's task, then streams the answer with that task's routers.

Who reads the question and shows the answer is not known here; the terminal is `terminal.py`. Shape letters: T tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from llava_cmoe.chat.location import NO_WAY, Verdict, agreeing_way, tasks_and_scores, verdict_of
from llava_cmoe.chat.opening import LearnedRun, open_learned
from llava_cmoe.chat.usage import experts_used
from llava_cmoe.data.batches import on_device
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import encode_prompt, end_mark, tokenizer_of
from llava_cmoe.data.encoding import Encoding, open_square
from llava_cmoe.data.images import open_image, side_of_square
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.rows import MARKER, Turn, question
from llava_cmoe.data.special_tokens import special_texts, why_special
from llava_cmoe.data.tasks import Geometry
from llava_cmoe.evaluation.answer_end import until_end
from llava_cmoe.evaluation.generate import greedy
from llava_cmoe.methods.base import DeferredLocation

LONGEST_ANSWER = 128
"""Tokens after which an answer is cut off; a task's own limit would need its name before it is located."""
LONGEST_PROMPT = 4096
"""Tokens that a conversation may have."""

BASE = -1
"""The task of an answer by the base model."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Reply:
    """What a run says.

    Attributes:
        verdict: the locator's; None where nobody located.
        pieces: the answer's text as it is generated.
        stop: ends the answer with its next token.
        used: share of each expert's slots over the question's and the answer's tokens, by site; known once the answer
            has ended, empty from a method without experts. Costs a forward pass.
    """

    verdict: Verdict | None
    pieces: Iterator[str]
    stop: threading.Event
    used: Callable[[], Mapping[str, Mapping[int, float]]]


def open_session(run: Path, after: int | None = None, merge: int | None = None) -> ChatSession:
    """Talk to a run; arguments and errors of `open_learned`."""
    return ChatSession(open_learned(run, after, merge))


class ChatSession:
    """A learned run that is asked one question after another; what was said before is the asker's to give."""

    def __init__(self, learned: LearnedRun) -> None:
        """Talk to what is learned."""
        self._learned, self._method = learned, learned.method
        self._processor = learned.backbone.processor
        self._worker = ThreadPoolExecutor(max_workers=1)  # one answer after another: they share a model and its plan
        self._method.model.eval()  # type: ignore[no-untyped-call]

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks that can be named to `ask`, in the order in which they were learned.

        None from a method that answers alike for all.
        """
        return self._learned.names if self._method.locates else ()

    def check_picture(self, image: Path) -> None:
        """Find what is wrong with a picture.

        Raises:
            DataError: it is missing, broken or too large.
        """
        open_image(image)
        for geometry in set(self._learned.geometries):
            side_of_square(image, geometry, self._learned.max_pixels)

    def ask(self, image: Path | None, text: str, earlier: Sequence[Turn] = (), task: int | None = None) -> Reply:
        """Read the question, about a picture or not, and locate it; the answer goes on while the reply is read.

        Args:
            image: what the conversation is about.
            text: the question.
            earlier: what was said before. The whole is located by its first question alone, as a task's own are.
            task: index of the task whose routers answer, or `BASE`; the located one's where absent.

        Raises:
            DataError: the picture is missing, broken or too large, the backbone reads text alone, the conversation is
                too long, or the question holds a special token.
        """
        turns: list[Turn] = [*earlier, {"role": "user", "text": text}]
        if (reason := why_special(turns, special_texts(self._processor))) is not None or MARKER in text:
            raise DataError(Problem(Path("question"), reason or f"it holds {MARKER}; name the picture with --image"))
        turns[0] = {"role": "user", "text": question(turns[0]["text"], image is not None)}
        stop, deferred, tokens = threading.Event(), list[DeferredLocation](), list[Tensor]()
        prompt, first_verdict, task = self._worker.submit(self._read, image, turns, task).result()
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        answering = self._worker.submit(self._answer, prompt, task, streamer, deferred, tokens, stop)
        # Whoever reads the stream waits for its end, also after an error.
        answering.add_done_callback(lambda _: streamer.end())  # type: ignore[no-untyped-call]
        first = next(streamer)  # comes when the prompt has been read, hence located, or with the end
        if answering.done():
            answering.result()  # an error over there is an error here
        pieces = until_end(chain([first], _rest(streamer, answering)), end_mark(self._processor))
        verdict = first_verdict or verdict_of(deferred[0](), 0, self._learned.names) if task is None else first_verdict
        chosen = task if verdict is None else self._index(verdict)
        return Reply(verdict, pieces, stop, partial(self._used, prompt, tokens, chosen))

    def _index(self, verdict: Verdict) -> int:
        return BASE if verdict.task is None else self._learned.names.index(verdict.task)

    def _read(
        self, image: Path | None, turns: Sequence[Turn], task: int | None
    ) -> tuple[Batch, Verdict | None, int | None]:
        """The conversation as a batch of one, the verdict on its first question where it has more, and its task.

        Its picture is squared as the task squares pictures that it is located at. Where several ways to square it agree
        with the task that is located then, the closest task is taken; where no task fits, the first way.
        """
        geometries, opening = self._learned.geometries, turns[:1]
        distinct = list(dict.fromkeys(geometries if task is None or task < 0 else [geometries[task]]))
        way = distinct[0]
        if image is not None and len(distinct) > 1 and task is None:
            batches = {geometry: self._batch(image, opening, geometry) for geometry in distinct}
            located = {geometry: tasks_and_scores(self._method, batch)[0] for geometry, batch in batches.items()}
            chosen = agreeing_way(located, geometries)
            if chosen is None:
                raise DataError(Problem(image, NO_WAY))
            way = chosen
        verdict = None
        if task is None and len(turns) > 1:
            verdict = verdict_of(self._method.locate(self._batch(image, opening, way)), 0, self._learned.names)
            task = None if verdict is None else self._index(verdict)
        return self._batch(image, turns, way), verdict, task

    def _batch(self, image: Path | None, turns: Sequence[Turn], geometry: Geometry) -> Batch:
        encoding = Encoding(self._processor, geometry, self._learned.max_pixels)
        try:
            picture = None if image is None else open_square(image, encoding)
            encoded = encode_prompt(self._processor, list(turns), picture)
        except MemoryError as error:
            raise DataError(
                Problem(image or Path(), "too little memory to read it; ask about a smaller one")
            ) from error
        if (length := len(encoded["input_ids"])) > LONGEST_PROMPT:
            reason = f"it has {length} tokens, and at most {LONGEST_PROMPT} are read; ask less, or begin anew"
            raise DataError(Problem(Path("question"), reason))
        collate = Collator(self._tokenizer.pad_token_id, "left")
        return on_device(collate([encoded]), self._method.model.device)

    def _answer(
        self,
        prompt: Batch,
        task: int | None,
        streamer: TextIteratorStreamer,
        deferred: list[DeferredLocation],
        tokens: list[Tensor],
        stop: threading.Event,
    ) -> None:
        model: Any = self._method.model
        with self._method.answering(prompt, _task_B(task)) as location:
            deferred.append(location)
            criteria = StoppingCriteriaList([_Stopped(stop)])
            greedily = greedy(model, self._processor, LONGEST_ANSWER)
            tokens.append(model.generate(**prompt, streamer=streamer, stopping_criteria=criteria, **greedily))

    def _used(self, prompt: Batch, tokens: Sequence[Tensor], task: int | None) -> Mapping[str, Mapping[int, float]]:
        said_T = tokens[0][0, prompt["input_ids"].shape[1] :]
        return self._worker.submit(experts_used, self._method, prompt, said_T, task).result()

    @property
    def _tokenizer(self) -> Any:
        return tokenizer_of(self._processor)


class _Stopped(StoppingCriteria):
    """Ends an answer that nobody wants to hear any further."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)


def _task_B(task: int | None) -> Tensor | None:
    return None if task is None else torch.tensor([task])


def _rest(streamer: TextIteratorStreamer, answering: Future[None]) -> Iterator[str]:
    yield from streamer
    answering.result()
