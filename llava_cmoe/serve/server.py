"""Runs behind a socket: answers until it is told to stop, finishes what it has begun.

The first SIGINT or SIGTERM lets what runs and waits be answered and takes nothing new; a second one ends all at once.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import uvicorn

from llava_cmoe.chat.opening import LearnedRun
from llava_cmoe.serve.app import Service, create_app
from llava_cmoe.serve.batching import Batcher
from llava_cmoe.serve.engine import Engines
from llava_cmoe.serve.gate import Guard, Places
from llava_cmoe.serve.limits import Limits
from llava_cmoe.serve.models import offered_models
from llava_cmoe.serve.page import PATHS
from llava_cmoe.serve.prompts import PromptReader
from llava_cmoe.settings.base import RecipeError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 1.0
"""Seconds that clients have to read that they are refused, when everything is ended."""
SPARE_CONNECTIONS = 64
"""Connections beyond those that hold places: for health, models and refusals. More get 503 before they are read."""


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `Server`: uvicorn would end by the signal again, not with status 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """Runs on one backbone, and one socket."""

    def __init__(
        self,
        runs: Mapping[str, LearnedRun],
        listening: socket.socket,
        guard: Guard,
        limits: Limits,
        with_page: bool = False,
    ) -> None:
        """Prepare to serve runs, by the names that they have for clients, on a socket that listens.

        With the page, its files need no key: they are the same for everybody.

        Raises:
            RecipeError: answers of this length leave no room for prompts.
        """
        self._listening, self._with_page = listening, with_page
        self._guard = replace(guard, open_paths=PATHS) if with_page else guard
        self._limits = _fitting(limits, next(iter(runs.values())))
        self._offered = offered_models(runs)
        self._engines = Engines(runs)
        self._stop: Callable[[], object] = lambda: None

    @property
    def models(self) -> tuple[str, ...]:
        """Names that requests may give."""
        return tuple(self._offered)

    def run(self, ready: Callable[[], object] = lambda: None) -> None:
        """Serve until stopped; `ready` is called when requests are answered."""
        asyncio.run(self._run(ready))

    def stop(self) -> None:
        """Finish what is begun, then return from `run`; from any thread. The second call waits for nothing."""
        self._stop()

    async def _run(self, ready: Callable[[], object]) -> None:
        batcher = Batcher(self._engines.answer, self._limits.batch)
        reader = PromptReader(self._offered, self._limits)
        places = Places(self._limits.batch + self._limits.queue)
        service = Service(batcher, places, reader, self._offered)
        server = _Uvicorn(
            uvicorn.Config(
                create_app(service, self._guard, self._limits, ready, self._with_page),
                log_config=None,
                access_log=False,
                http="h11",
                ws="none",
                lifespan="on",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=places.free + SPARE_CONNECTIONS,
                timeout_graceful_shutdown=int(self._limits.seconds) + 1,
            )
        )

        def stop() -> None:
            if server.should_exit:
                batcher.refuse_all()
                loop.call_later(PATIENCE, setattr, server, "force_exit", True)
            places.closing = server.should_exit = True

        loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(stop)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                loop.add_signal_handler(number, stop)
        try:
            await server.serve([self._listening])
        finally:
            self._stop = lambda: None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises OSError where there is none to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def _fitting(limits: Limits, learned: LearnedRun) -> Limits:
    """Limits under which prompt and answer fit the positions that the model knows."""
    positions = getattr(learned.method.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return limits
    room = positions - limits.answer_tokens
    if room < 1:
        raise RecipeError(
            f"answers of {limits.answer_tokens} tokens leave no room for a prompt: the model knows {positions} "
            "positions; set --max-answer-tokens lower"
        )
    return replace(limits, prompt_tokens=min(limits.prompt_tokens, room))
