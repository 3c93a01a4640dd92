"""Answers a batch of prompts at once, whatever their tasks, and reports each answer while it grows.

The only place of this room that calls the models; one thread does. Who waits for the answers is not known here.
Shape letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from llava_cmoe.chat.location import NO_WAY, Verdict, agreeing_way, tasks_and_scores, verdict_of
from llava_cmoe.chat.opening import LearnedRun
from llava_cmoe.chat.usage import experts_used
from llava_cmoe.data.batches import on_device
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.data.tasks import Geometry
from llava_cmoe.evaluation.answer_end import AnswerReader
from llava_cmoe.evaluation.generate import greedy
from llava_cmoe.serve.limits import Refused
from llava_cmoe.serve.prompts import Prompt


@dataclass(frozen=True)
class Growing:
    """An answer so far, as far as it is certain."""

    text: str


@dataclass(frozen=True)
class Answered:
    """An answer at its end.

    Attributes:
        text: all of it.
        finish: `stop` where it ended by itself, `length` where it was cut off.
        prompt_tokens: tokens read, padding apart.
        answer_tokens: tokens generated, the end's included.
        task: name of the task whose routers answered; None for the base model, and where no task makes a difference.
        located: whether a locator found that out; a given task has no scores.
        scores: every known task's score, the closest task (the lowest score) first; empty where nobody located.
        experts: share of each expert's slots, by site in order of depth; None where nobody asked for them.
    """

    text: str
    finish: str
    prompt_tokens: int
    answer_tokens: int
    task: str | None
    located: bool
    scores: Mapping[str, float]
    experts: Mapping[str, Mapping[int, float]] | None = None


Event = Growing | Answered | Refused


class Asking(Protocol):
    """Who waits for an answer."""

    @property
    def prompt(self) -> Prompt:
        """What is asked."""
        ...

    @property
    def streams(self) -> bool:
        """Whether the answer is wanted while it grows."""
        ...

    @property
    def left(self) -> bool:
        """Whether nobody waits any more; the answer may end then."""
        ...

    def put(self, event: Event) -> None:
        """Called with the answer as it grows, and once with its end or why there is none."""
        ...


class Engines:
    """Runs that answer, one after another: each its own part of the prompts that wait together."""

    def __init__(self, runs: Mapping[str, LearnedRun]) -> None:
        """By the names that prompts give."""
        self._engines = {name: Engine(learned) for name, learned in runs.items()}

    def answer(self, asks: Sequence[Asking]) -> None:
        """Answer prompts that wait together; every ask that stays is put its end."""
        for name in dict.fromkeys(ask.prompt.run for ask in asks):
            self._engines[name].answer([ask for ask in asks if ask.prompt.run == name])


class Engine:
    """A learned run that answers batches."""

    def __init__(self, learned: LearnedRun) -> None:
        """The model goes into evaluation mode; its tokenizer is copied, as another thread uses the run's."""
        self._learned, self._method = learned, learned.method
        self._processor = deepcopy(learned.backbone.processor)
        self._reader = AnswerReader(self._method.model, self._processor)
        self._method.model.eval()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def answer(self, asks: Sequence[Asking]) -> None:
        """Answer prompts that wait together; every ask that stays is put its end.

        They are one batch, unless some tasks are given, others located, and the method's answers depend on which of the
        two it was (soft selection): then these are two.
        """
        located = [ask for ask in asks if ask.prompt.task is None]
        if self._method.answers_by_task or not self._method.locates or len(located) in (0, len(asks)):
            self._answer_together(asks)
        else:
            self._answer_together(located)
            self._answer_together([ask for ask in asks if ask.prompt.task is not None])

    def _answer_together(self, asks: Sequence[Asking]) -> None:
        rows = self._rows(asks)
        asks = [ask for ask in asks if ask in rows]
        if not asks:
            return
        given = [ask.prompt.task for ask in asks]
        batch = self._batch([rows[ask] for ask in asks])
        verdicts: list[Verdict | None] = [None] * len(asks)
        tasks = given
        if None in given and set(given) != {None}:
            places = [place for place, task in enumerate(given) if task is None]
            found = self._method.locate(self._batch([rows[asks[place]] for place in places]))
            assert found is not None, "a method that answers by task"
            tasks = list(given)
            for row, place in enumerate(places):
                tasks[place] = int(found.task_B[row])
                verdicts[place] = verdict_of(found, row, self._learned.names)
        known = [task for task in tasks if task is not None]
        task_B = torch.tensor(known) if len(known) == len(asks) else None
        with self._method.answering(batch, task_B) as location:

            def verdict(row: int) -> Verdict | None:
                return verdicts[row] or verdict_of(location(), row, self._learned.names)

            lengths = [len(rows[ask]["input_ids"]) for ask in asks]
            decoding = _Decoding(asks, lengths, self._reader, self._learned.names, verdict)
            model: Any = self._method.model
            longest = max(ask.prompt.answer_tokens for ask in asks)
            criteria = StoppingCriteriaList([decoding])
            model.generate(**batch, **greedy(model, self._processor, longest), stopping_criteria=criteria)
        for row, answer in decoding.held.items():
            if not asks[row].left:
                used = self._used(rows[asks[row]], decoding.tokens[row], tasks[row], answer)
                asks[row].put(replace(answer, experts=used))

    def _used(
        self, row: dict[str, Tensor], tokens: Sequence[int], given: int | None, answer: Answered
    ) -> Mapping[str, Mapping[int, float]]:
        """The experts of an answer, by the routers that it was given or located at."""
        task = given
        if answer.located:
            task = -1 if answer.task is None else self._learned.names.index(answer.task)
        prompt = self._batch([row])
        return experts_used(self._method, prompt, torch.tensor(tokens, device=prompt["input_ids"].device), task)

    def _rows(self, asks: Sequence[Asking]) -> dict[Asking, dict[str, Tensor]]:
        """Each prompt, its picture squared as its task squares pictures; what no way is found for is refused."""
        rows = {ask: next(iter(ask.prompt.ways.values())) for ask in asks if len(ask.prompt.ways) == 1}
        several = [ask for ask in asks if ask not in rows]
        if several:
            ways: Sequence[Geometry] = list(several[0].prompt.ways)
            found = {
                way: tasks_and_scores(self._method, self._batch([ask.prompt.ways[way] for ask in several]))
                for way in ways
            }
            for place, ask in enumerate(several):
                chosen = agreeing_way({way: found[way][place] for way in ways}, self._learned.geometries)
                if chosen is None:
                    ask.put(Refused(400, NO_WAY, "messages.0.content", "invalid_image"))
                else:
                    rows[ask] = ask.prompt.ways[chosen]
        return rows

    def _batch(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Left-padded, where the model is."""
        collate = Collator(tokenizer_of(self._processor).pad_token_id, "left")
        return on_device(collate(rows), self._method.model.device)


class _Decoding(StoppingCriteria):
    """Watches a batch being decoded: reports what each row says, and ends rows one by one.

    Attributes:
        tokens: that each row has said.
        held: by row, answers at their end of which the experts are still to be seen.
    """

    def __init__(
        self,
        asks: Sequence[Asking],
        lengths: Sequence[int],
        reader: AnswerReader,
        names: Sequence[str],
        verdict: Callable[[int], Verdict | None],
    ) -> None:
        self._asks, self._lengths, self._reader, self._names, self._verdict = asks, lengths, reader, names, verdict
        self.tokens: list[list[int]] = [[] for _ in asks]
        self.held: dict[int, Answered] = {}
        self._done = [False] * len(asks)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which rows are done (B,), after every step; costs the sync that a stream needs anyway."""
        for row, token in enumerate(input_ids[:, -1].tolist()):
            self._done[row] = self._done[row] or self._read(row, token)
        return torch.tensor(self._done, device=input_ids.device)

    def _read(self, row: int, token: int) -> bool:
        """Take a row's next token; returns whether it is its last."""
        ask, tokens = self._asks[row], self.tokens[row]
        if ask.left:
            return True
        tokens.append(token)
        ended = self._reader.ended(tokens)
        if not ended and len(tokens) < ask.prompt.answer_tokens:
            if ask.streams:
                ask.put(Growing(self._reader.certain(tokens)))
            return False
        verdict, given = self._verdict(row), ask.prompt.task
        task = verdict.task if verdict is not None else None if given is None or given < 0 else self._names[given]
        answer = Answered(
            self._reader.text(tokens),
            "stop" if ended else "length",
            self._lengths[row],
            len(tokens),
            task,
            verdict is not None,
            {} if verdict is None else verdict.scores,
        )
        if ask.prompt.experts:
            self.held[row] = answer
            if ask.streams:
                ask.put(Growing(answer.text))
        else:
            ask.put(answer)
        return True
