"""The routes: chat completions, models, health, maybe the page. Reads a request, waits for the answer, sends it.

Whoever hangs up is noticed while waiting and while streaming; their row ends, and their place is free.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from llava_cmoe.serve.batching import Ask, Batcher
from llava_cmoe.serve.engine import Answered, Growing
from llava_cmoe.serve.gate import COMPLETIONS, Gate, Guard, Places
from llava_cmoe.serve.limits import Limits, Refused, one_line
from llava_cmoe.serve.models import Offered
from llava_cmoe.serve.page import add_page
from llava_cmoe.serve.prompts import Prepared, PromptReader
from llava_cmoe.serve.replies import Head, chunks, completion, models

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

HUNG_UP = 499
"""A status that nobody reads, for the log."""


@dataclass(frozen=True)
class Service:
    """What answers: the queue before a model and its places, the reader of requests, and the models' names."""

    batcher: Batcher
    places: Places
    reader: PromptReader
    offered: Mapping[str, Offered]


def create_app(
    service: Service,
    guard: Guard,
    limits: Limits,
    ready: Callable[[], object] = lambda: None,
    with_page: bool = False,
) -> Gate:
    """The application, with the page on top if wanted; `ready` is called when it can answer."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(service.batcher.running())
            app.state.preparing = stack.enter_context(ThreadPoolExecutor(1, "prompts"))
            ready()
            yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, Any]:
        counts = {"answering": service.batcher.num_answering, "waiting": service.batcher.num_waiting}
        return {"status": "ok", **counts, "free": service.places.free}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": models(service.offered, created)}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name not in service.offered:
            raise Refused(404, "there is no such model", "model", "model_not_found")
        return models({name: service.offered[name]}, created)[0]

    @app.post(COMPLETIONS)
    async def complete(request: Request) -> Response:
        return await _complete(request, service, limits)

    if with_page:
        add_page(app)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return Gate(app, guard, service.places)


async def _complete(request: Request, service: Service, limits: Limits) -> Response:
    deadline = asyncio.get_running_loop().time() + limits.seconds
    body = await _body(request, limits, deadline)
    loop, preparing = asyncio.get_running_loop(), request.app.state.preparing

    async def prepared() -> Prepared:
        return await loop.run_in_executor(preparing, service.reader.prepare, body)

    asked, prompt = await _attended(request, prepared(), deadline)
    ask, head, kept = service.batcher.submit(prompt, asked.stream), Head(asked.model), False
    try:
        if not asked.stream:
            return JSONResponse(completion(head, await _attended(request, ask.answer(), deadline)))
        first = await _attended(request, ask.next(), deadline)  # what fails until here has a status of its own
        sent = _sent(chunks(head, _events(ask, first, deadline), asked.wants_usage))
        kept = True
        return _Stream(sent, lambda: service.batcher.leave(ask), limits.seconds)
    finally:
        if not kept:
            service.batcher.leave(ask)


class _Stream(EventSourceResponse):
    """Events as they come; whatever ends it, `leave` is called."""

    def __init__(self, content: AsyncIterator[dict[str, str]], leave: Callable[[], None], seconds: float) -> None:
        super().__init__(content, sep="\n", send_timeout=seconds)
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _sent(data: AsyncIterator[str]) -> AsyncIterator[dict[str, str]]:
    """Data of events; an error is the last one, and no `[DONE]` follows."""
    try:
        async for one in data:
            yield {"data": one}
    except Refused as refused:
        yield {"data": json.dumps(refused.body)}


async def _events(ask: Ask, first: Growing | Answered, deadline: float) -> AsyncIterator[Growing | Answered]:
    event = first
    while True:
        yield event
        if isinstance(event, Answered):
            return
        try:
            async with asyncio.timeout_at(deadline):
                event = await ask.next()
        except TimeoutError as error:
            raise _too_late() from error


async def _body(request: Request, limits: Limits, deadline: float) -> bytes:
    """The request's body.

    Raises:
        Refused: of another type, too large, or too slow.
        ClientDisconnect: it ended before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "send the header Content-Type: application/json", code="wrong_content_type")
    too_large = Refused(413, f"the body has more than {limits.body_bytes} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout_at(deadline):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError as error:
        raise Refused(408, "the body came too slowly", code="timeout") from error
    return bytes(body)


async def _attended(request: Request, waiting: Awaitable[Result], deadline: float) -> Result:
    """The result, while somebody waits for it.

    Raises:
        Refused: it is too late.
        ClientDisconnect: nobody waits any more.
    """
    wanted, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(_gone(request))
    try:
        left = deadline - asyncio.get_running_loop().time()
        await asyncio.wait([wanted, gone], timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise ClientDisconnect if gone.done() else _too_late()
    finally:
        wanted.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_late() -> Refused:
    return Refused(504, "the answer took too long", code="timeout")


async def _refused(request: Request, error: Any) -> Response:
    return JSONResponse(error.body, error.status, dict(error.headers))


async def _hung_up(request: Request, error: Any) -> Response:
    return Response(status_code=HUNG_UP)


async def _http(request: Request, error: Any) -> Response:
    return await _refused(request, Refused(error.status_code, str(error.detail), headers=error.headers or {}))


async def _failed(request: Request, error: Any) -> Response:
    logger.error("a request failed: %s", one_line(error))
    return await _refused(request, Refused(500, "the server failed; its log says why", code="server_failed"))


_HANDLERS: Mapping[Any, Callable[[Request, Any], Awaitable[Response]]] = {
    Refused: _refused,
    ClientDisconnect: _hung_up,
    HTTPException: _http,
    Exception: _failed,
}
