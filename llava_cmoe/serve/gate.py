"""What a request passes before anything of it is read: the key, the host, a place; and one log line for each.

A place is held until the answer is sent, or whoever asked has hung up.
"""

from __future__ import annotations

import hmac
import logging
import time
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_cmoe.serve.limits import Refused, closing
from llava_cmoe.settings.base import shown

logger = logging.getLogger(__name__)

COMPLETIONS = "/v1/chat/completions"
LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Names of this machine. A web page whose own name is made to lead here would send another."""


@dataclass(frozen=True)
class Guard:
    """Who may ask.

    Attributes:
        key: to be sent as `Authorization: Bearer KEY`; anybody may ask when None.
        names: by which a request may call the server; any when None.
        open_paths: that are read without the key.
    """

    key: str | None = None
    names: frozenset[str] | None = LOCAL
    open_paths: frozenset[str] = frozenset()


@dataclass
class Places:
    """How many more requests are taken: those being answered and those that wait hold one each."""

    free: int
    closing: bool = False


class Gate:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, guard: Guard, places: Places) -> None:
        self._app, self._guard, self._places, self._num_places = app, guard, places, places.free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            needs_place = self._admit(scope)
        except Refused as refused:
            response = JSONResponse(refused.body, refused.status, dict(refused.headers))
            await response(scope, receive, watched)
        else:
            self._places.free -= needs_place
            try:
                await self._app(scope, receive, watched)
            finally:
                self._places.free += needs_place
        seconds = time.monotonic() - began
        logger.info("%s %s: %s, %.2f s", scope["method"], shown(scope["path"]), status or "hung up", seconds)

    def _admit(self, scope: Scope) -> int:
        """Places that the request takes.

        Raises:
            Refused: a wrong key or host, no place, or the server closes.
        """
        headers = dict(scope["headers"])
        if self._guard.key is not None and scope["path"] not in self._guard.open_paths:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._guard.key}".encode()):
                raise Refused(401, "the key is missing or wrong", code="invalid_api_key")
        if self._guard.names is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            if name not in self._guard.names:
                raise Refused(403, "the server answers under the names of its own machine alone", code="wrong_host")
        if scope["path"] != COMPLETIONS or scope["method"] != "POST":
            return 0
        if self._places.closing:
            raise closing()
        if self._places.free <= 0:
            reason = f"{self._num_places} requests are being answered or wait; try again later"
            raise Refused(429, reason, code="queue_full", headers={"Retry-After": "1"})
        return 1
