"""A server in a thread of the tests' own process, and what its clients send."""

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from PIL import Image
from tiny import Lesson

from llava_cmoe.chat.opening import LearnedRun
from llava_cmoe.serve.engine import Answered, Engines, Event
from llava_cmoe.serve.gate import LOCAL, Guard
from llava_cmoe.serve.limits import Limits
from llava_cmoe.serve.prompts import Prompt
from llava_cmoe.serve.server import Server, listen

SMALL = Limits(batch=4, queue=8, seconds=60, body_bytes=200_000, pixels=10_000, prompt_tokens=200, answer_tokens=12)
PATH = "/v1/chat/completions"


class Held(Engines):
    """Notes its batches, and answers none while `opened` is cleared."""

    def __init__(self, runs: Mapping[str, LearnedRun]) -> None:
        super().__init__(runs)
        self.batches: list[list[Any]] = []
        self.began, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def answer(self, asks: Sequence[Any]) -> None:
        self.batches.append(list(asks))
        self.began.set()
        self.opened.wait(60)
        super().answer(asks)


class Running:
    """A server that runs: its address, its engine, and ways to ask it."""

    def __init__(self, server: Server, port: int, key: str | None) -> None:
        self.server, self.engine, self.key = server, server._engines, key
        self.port, self.address = port, f"http://127.0.0.1:{port}"

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key=self.key or "none", max_retries=0, **options)

    def post(self, body: Any, **headers: str) -> httpx2.Response:
        """The answer to any body, JSON unless it is bytes."""
        if isinstance(body, bytes):
            sent = {"content-type": "application/json", **headers}
            return httpx2.post(self.address + PATH, content=body, headers=sent, timeout=60)
        return httpx2.post(self.address + PATH, json=body, headers=headers, timeout=60)

    def health(self) -> dict[str, Any]:
        return httpx2.get(f"{self.address}/health", timeout=60).json()


@contextmanager
def serving(
    runs: LearnedRun | Mapping[str, LearnedRun],
    limits: Limits = SMALL,
    key: str | None = None,
    held: bool = False,
    with_page: bool = False,
) -> Iterator[Running]:
    """Serve one run as `run`, or several, while open; afterwards the server has to have ended by itself."""
    runs = {"run": runs} if isinstance(runs, LearnedRun) else runs
    listening, ready = listen("127.0.0.1", 0), threading.Event()
    server = Server(runs, listening, Guard(key, LOCAL if key is None else None), limits, with_page)
    if held:
        server._engines = Held(runs)
    thread = threading.Thread(target=server.run, args=(ready.set,))
    thread.start()
    assert ready.wait(60)
    try:
        yield Running(server, listening.getsockname()[1], key)
    finally:
        if isinstance(server._engines, Held):
            server._engines.opened.set()
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


class Listener:
    """Waits for an answer of the engine, and notes what comes."""

    left = False

    def __init__(self, prompt: Prompt, streams: bool = False) -> None:
        self.prompt, self.streams, self.events = prompt, streams, list[Event]()

    def put(self, event: Event) -> None:
        self.events.append(event)

    @property
    def answer(self) -> Answered:
        assert isinstance(self.events[-1], Answered), self.events
        return self.events[-1]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never came")


def data_url(picture: Image.Image | bytes | Path) -> str:
    """A picture as clients send it."""
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, "PNG")
        picture = file.getvalue()
    elif isinstance(picture, Path):
        picture = picture.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def message(text: str, url: str | None = None) -> list[dict[str, Any]]:
    """One message, with a picture behind the words."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if url is not None:
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": parts}]


def asked(lesson: Lesson, task: str, index: int) -> list[dict[str, Any]]:
    """An evaluation row as a message."""
    row = lesson.run.eval_spec.rows[task][index]
    text = row["turns"][0]["text"].removeprefix("<image>\n")
    return message(text, data_url(Path(row["image"])) if row["image"] else None)


def mixture(lesson: Lesson, name: str = "run") -> list[dict[str, Any]]:
    """Requests of both tasks, with and without pictures, by every model, of several lengths."""
    models = (name, f"{name}:colours", f"{name}:base", name, f"{name}:sides", name)
    rows = (("colours", 0), ("sides", 1), ("colours", 3), ("sides", 0), ("sides", 2), ("colours", 1))
    return [
        {"model": model, "messages": asked(lesson, *row), "max_tokens": longest}
        for model, row, longest in zip(models, rows, (12, 3, 12, 12, 1, 7), strict=True)
    ]
