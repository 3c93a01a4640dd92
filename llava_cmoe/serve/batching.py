"""The queue before the model: what waits together is answered together, in the one thread that owns the model.

Lives in an event loop; only `Ask.put` is called from the model's thread. Nothing waits for mates: a batch begins as
soon as the one before it has ended, with whatever has come since.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from llava_cmoe.serve.engine import Answered, Event, Growing
from llava_cmoe.serve.limits import Refused, closing, one_line
from llava_cmoe.serve.prompts import Prompt

logger = logging.getLogger(__name__)


class Ask:
    """One prompt on its way, and what comes back."""

    def __init__(self, prompt: Prompt, streams: bool) -> None:
        """To be made in the event loop that waits for the answer."""
        self.prompt, self.streams, self.left = prompt, streams, False
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def put(self, event: Event) -> None:
        """Report what happens; from any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Growing | Answered:
        """What comes next.

        Raises:
            Refused: there is no answer.
        """
        event = await self._events.get()
        if isinstance(event, Refused):
            raise event
        return event

    async def answer(self) -> Answered:
        """The end of the answer; errors of `next`."""
        while not isinstance(event := await self.next(), Answered):
            pass
        return event


class Batcher:
    """Hands waiting asks to the model, some at a time."""

    def __init__(self, answer: Callable[[Sequence[Ask]], None], most: int) -> None:
        """Call `answer` with up to `most` asks, always in the same thread."""
        self._answer, self._most = answer, most
        self._waiting: list[Ask] = []
        self._answering: Sequence[Ask] = ()
        self._some = asyncio.Event()

    @property
    def num_waiting(self) -> int:
        """Asks that no batch holds yet."""
        return len(self._waiting)

    @property
    def num_answering(self) -> int:
        """Asks of the batch that runs."""
        return len(self._answering)

    def submit(self, prompt: Prompt, streams: bool) -> Ask:
        """Put a prompt into the queue."""
        ask = Ask(prompt, streams)
        self._waiting.append(ask)
        self._some.set()
        return ask

    def leave(self, ask: Ask) -> None:
        """Nobody waits for this one any more: it leaves the queue, or its row ends with the next token."""
        ask.left = True
        if ask in self._waiting:
            self._waiting.remove(ask)

    def refuse_all(self) -> None:
        """End everything as soon as can be."""
        for ask in (*self._waiting, *self._answering):
            ask.put(closing())
            self.leave(ask)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer while open."""
        with ThreadPoolExecutor(1, "model") as worker:
            task = asyncio.create_task(self._run(worker))
            try:
                yield
            finally:
                self.refuse_all()
                task.cancel()

    async def _run(self, worker: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            self._answering, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            if not self._waiting:
                self._some.clear()
            if not self._answering:
                continue
            done = loop.run_in_executor(worker, self._answer, self._answering)
            await asyncio.wait([done])
            if (error := done.exception()) is not None:
                logger.error("%d requests could not be answered: %s", len(self._answering), one_line(error))
                for ask in self._answering:
                    ask.put(Refused(500, "the model failed; the server's log says why", code="model_failed"))
            self._answering = ()
