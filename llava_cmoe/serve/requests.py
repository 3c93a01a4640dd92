"""The chat completions that are accepted: OpenAI's fields that are honoured; every other one is refused by name.

What differs from most servers of this API: nothing is dropped in silence. A field that would change nothing (`n` of 1,
`temperature` of 0, null) is accepted; one that would, and is not honoured, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llava_cmoe.serve.limits import Refused
from llava_cmoe.settings.base import shown
from llava_cmoe.settings.plain_json import PlainJsonError, parse_json

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ()),
    **dict.fromkeys(("metadata", "user", "safety_identifier", "prompt_cache_key"), ()),
}
"""OpenAI's fields that are not honoured, and their values under which that makes no difference, beside null."""

SAYS: Mapping[str, str] = {
    "temperature": "decoding is greedy; leave it out or set it to 0",
    "n": "each request gets one answer; leave it out or set it to 1",
    "system": "a run is taught without system messages; put the instruction into the user's text",
}
"""What to do instead, where it is not just to leave a field out."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextPart(_Record):
    """Words of a message."""

    type: Literal["text"]
    text: str


class Address(_Record):
    """Where a picture is: a data: URL, which holds it."""

    url: str
    detail: Literal["auto"] | None = None


class PicturePart(_Record):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: Address


class Message(_Record):
    """One turn: words, and in the first one a picture."""

    role: Literal["user", "assistant"]
    content: list[Annotated[TextPart | PicturePart, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _words_alone(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(_Record):
    """How an answer is streamed."""

    include_usage: bool = False


class Extras(_Record):
    """What is asked beside OpenAI's fields."""

    experts: bool = False


class ChatRequest(_Record):
    """A request that can be honoured.

    Attributes:
        model: one of those that `GET /v1/models` lists.
        messages: user and assistant by turns, the last one the user's.
        stream: whether the answer is sent while it is generated.
        stream_options: how it is streamed.
        max_tokens: longest answer.
        max_completion_tokens: the same under its newer name.
        seed: without effect, since nothing is drawn.
        llava_cmoe: what else is wanted, no field of OpenAI's; `experts` costs a forward pass.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    llava_cmoe: Extras | None = None

    def answer_tokens(self, most: int) -> int:
        """The longest answer that is wanted, `most` where nothing is said.

        Raises:
            Refused: more than `most`, or two different numbers.
        """
        wanted = {
            name: value
            for name in ("max_tokens", "max_completion_tokens")
            if (value := getattr(self, name)) is not None
        }
        if len(set(wanted.values())) > 1:
            raise Refused(400, "max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        for name, value in wanted.items():
            if value > most:
                raise Refused(400, f"{name} is {shown(value)}; answers have at most {most} tokens here", name)
        return next(iter(wanted.values()), most)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_experts(self) -> bool:
        """Whether the experts that the answer used are wanted."""
        return self.llava_cmoe is not None and self.llava_cmoe.experts


def read_request(body: bytes) -> ChatRequest:
    """A request from its body.

    Raises:
        Refused: not JSON, not of this form, or a field that is not honoured; names the field.
    """
    try:
        document = parse_json(body)
    except (PlainJsonError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(400, f"the body is not JSON that can be used: {error}", code="invalid_json") from error
    if not isinstance(document, dict):
        raise Refused(400, "the body is no JSON object", code="invalid_json")
    fields = {name: value for name, value in document.items() if not _is_neutral(name, value)}
    for name in fields.keys() & NEUTRAL.keys():
        raise _not_honoured(name, name, fields[name])
    _refuse_roles(fields.get("messages"))
    try:
        asked = ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise Refused(400, f"{shown(place)} is no field that is known here; leave it out", place[:80]) from error
        raise Refused(400, f"{place}: {first['msg']}", place) from error
    if asked.stream_options is not None and not asked.stream:
        raise Refused(400, "stream_options is of streams alone; set stream to true", "stream_options")
    return asked


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a field that is not honoured would change nothing; `true` is not 1 here."""
    known = NEUTRAL.get(name)
    return known is not None and (
        value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)
    )


def _refuse_roles(messages: Any) -> None:
    """Raise for a role that OpenAI has and a run does not."""
    for place, message in enumerate(messages if isinstance(messages, list) else []):
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer", "tool", "function"):
            raise _not_honoured(f"messages.{place}.role", "system" if role == "developer" else role, role)


def _not_honoured(param: str, name: str, value: Any) -> Refused:
    what = SAYS.get(name, "leave it out")
    return Refused(400, f"{param} of {shown(value)} is not supported: {what}", param, "unsupported_parameter")
