"""What one server takes on: sizes, times and places, each with its default; and how a request is refused.

Who checks a limit stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS: Mapping[int, str] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""OpenAI's `type` by status; what is not here is a request's own fault, or from 500 on the server's."""

LONGEST_LOGGED = 200
"""Letters of an error that are logged."""


@dataclass(frozen=True)
class Limits:
    """How much a server takes on.

    Attributes:
        batch: requests that are answered together, at most (`batching.py`).
        queue: requests that may wait beside them; the next one gets 429 (`gate.py`).
        seconds: from a request's first byte to the last of its answer (`app.py`).
        body_bytes: of a request, its pictures in base64 included (`app.py`).
        pixels: of the square around a picture, known before it is decoded (`prompts.py`).
        prompt_tokens: of a prompt, those of its picture included (`prompts.py`).
        answer_tokens: of an answer; also its length where a request names none (`requests.py`).
    """

    batch: int = 8
    queue: int = 64
    seconds: float = 120.0
    body_bytes: int = 20_000_000
    pixels: int = 40_000_000
    prompt_tokens: int = 4096
    answer_tokens: int = 256


@dataclass(eq=False)
class Refused(Exception):
    """A request that gets no answer.

    Attributes:
        status: of HTTP.
        message: what is wrong, and what to do about it.
        param: the field that is to blame.
        code: a word for programs.
        headers: that go with it.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def closing() -> Refused:
    """The answer to all that come, or still wait, when a server ends."""
    return Refused(503, "the server closes", code="closing", headers={"Connection": "close"})


def one_line(error: BaseException) -> str:
    """An error as the log has it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_LOGGED]
