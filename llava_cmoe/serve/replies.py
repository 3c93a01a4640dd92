"""Answers as OpenAI writes them: whole, or as the chunks of a stream; and the list of models.

Beside OpenAI's fields stands `llava_cmoe`: of an answer the task whose routers answered, the locator's scores and the
experts; of a model what it stands for.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_cmoe.report.figures import site_labels
from llava_cmoe.serve.engine import Answered, Growing
from llava_cmoe.serve.models import Offered

OWNER = "llava_cmoe"


@dataclass(frozen=True)
class Head:
    """What all parts of one answer say of it: the model as it was named, an id, the time."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def document(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An object of this answer."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **fields}


def models(offered: Mapping[str, Offered], created: int) -> list[dict[str, Any]]:
    """The models that are offered, each with what it stands for."""
    fields = {"object": "model", "created": created, "owned_by": OWNER}
    return [{"id": name, **fields, "llava_cmoe": model.facts} for name, model in offered.items()]


def completion(head: Head, answer: Answered) -> dict[str, Any]:
    """A whole answer."""
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}
    return head.document("chat.completion", choices=[choice], usage=usage(answer), llava_cmoe=verdict(answer))


def usage(answer: Answered) -> dict[str, int]:
    """Numbers of tokens."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.answer_tokens,
        "total_tokens": answer.prompt_tokens + answer.answer_tokens,
    }


def verdict(answer: Answered) -> dict[str, Any]:
    """The task whose routers answered, null for the base model; the scores, null where nothing was located.

    A score that is no finite number is null, as JSON has no other word for it. The experts stand there if they were
    asked for: a list of sites in order of depth.
    """
    scores = {name: score if math.isfinite(score) else None for name, score in answer.scores.items()}
    said = {"task": answer.task, "located": answer.located, "scores": scores if answer.located else None}
    if answer.experts is None:
        return said
    labels = site_labels(list(answer.experts))
    sites = zip(answer.experts.items(), labels, strict=True)
    return {**said, "experts": [{"site": site, "label": label, "shares": shares} for (site, shares), label in sites]}


async def chunks(head: Head, events: AsyncIterator[Growing | Answered], with_usage: bool) -> AsyncIterator[str]:
    """An answer as the data of a stream's events, `[DONE]` the last."""
    none = {"usage": None} if with_usage else {}

    def chunk(delta: dict[str, Any], finish: str | None = None, **fields: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return json.dumps(head.document("chat.completion.chunk", choices=[choice], **none, **fields))

    yield chunk({"role": "assistant", "content": ""})
    sent = ""
    async for event in events:
        if event.text.startswith(sent) and event.text != sent:
            yield chunk({"content": event.text[len(sent) :]})
            sent = event.text
        if isinstance(event, Answered):
            yield chunk({}, event.finish, llava_cmoe=verdict(event))
            if with_usage:
                parts = {"choices": [], "usage": usage(event), "llava_cmoe": verdict(event)}
                yield json.dumps(head.document("chat.completion.chunk", **parts))
    yield "[DONE]"
