"""From a request's body to the tokens that a model reads: pictures decoded, everything refused that cannot be answered.

Runs beside the model, one request after another, with a processor of its own: a tokenizer is not shared by threads.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

from torch import Tensor

from llava_cmoe.data.conversation import encode_prompt
from llava_cmoe.data.encoding import Encoding, open_square
from llava_cmoe.data.images import size_of
from llava_cmoe.data.problems import DataError
from llava_cmoe.data.rows import MARKER, Turn, question
from llava_cmoe.data.special_tokens import special_texts, why_special
from llava_cmoe.data.tasks import Geometry
from llava_cmoe.serve.limits import Limits, Refused
from llava_cmoe.serve.models import Offered
from llava_cmoe.serve.requests import ChatRequest, PicturePart, TextPart, read_request
from llava_cmoe.settings.base import shown

LETTERS_A_TOKEN = 32
"""More letters than a token has on average in any text: one that is longer than this allows is not even tokenised."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        run: name of the run that is asked.
        ways: the encoded prompt by how its picture is squared; several only where the task decides, and is not known.
        task: index of the task whose routers answer, -1 for the base model; None if it is to be located.
        answer_tokens: longest answer.
        experts: whether the experts that the answer used are wanted, too.
    """

    run: str
    ways: Mapping[Geometry, dict[str, Tensor]]
    task: int | None
    answer_tokens: int
    experts: bool = False


class Prepared(NamedTuple):
    """A request and its prompt."""

    asked: ChatRequest
    prompt: Prompt


class PromptReader:
    """Makes prompts for runs on one backbone."""

    def __init__(self, offered: Mapping[str, Offered], limits: Limits) -> None:
        """For the models that are offered."""
        self._processor = deepcopy(next(iter(offered.values())).learned.backbone.processor)
        self._offered, self._limits = offered, limits
        self._special = special_texts(self._processor)

    def prepare(self, body: bytes) -> Prepared:
        """A request from its body, with what the model reads.

        Raises:
            Refused: says what is wrong, and which field is to blame.
        """
        asked = read_request(body)
        if asked.model not in self._offered:
            known = ", ".join(self._offered)
            raise Refused(404, f"there is no model {shown(asked.model)}; there is {known}", "model", "model_not_found")
        model, longest = self._offered[asked.model], asked.answer_tokens(self._limits.answer_tokens)
        picture, turns = self._picture(asked), self._turns(asked)
        encodings = [
            Encoding(self._processor, way, model.learned.max_pixels) for way in _ways(model, picture is not None)
        ]
        ways = {encoding.geometry: self._encoded(turns, picture, encoding) for encoding in encodings}
        return Prepared(asked, Prompt(model.run, ways, model.task, longest, asked.wants_experts))

    def _turns(self, asked: ChatRequest) -> list[Turn]:
        turns: list[Turn] = []
        for place, message in enumerate(asked.messages):
            if message.role != ("user", "assistant")[place % 2]:
                raise Refused(400, "user and assistant take turns, the user first", f"messages.{place}.role")
            text = "\n".join(part.text for part in message.content if isinstance(part, TextPart))
            if MARKER in text:
                reason = f"it holds {MARKER}; give the picture as a part of type image_url"
                raise Refused(400, reason, f"messages.{place}.content")
            turns.append({"role": message.role, "text": text})
        if turns[-1]["role"] != "user":
            raise Refused(400, "the last message is the user's", "messages")
        if sum(len(turn["text"]) for turn in turns) > LETTERS_A_TOKEN * self._limits.prompt_tokens:
            raise self._too_long("far more tokens")
        if (special := why_special(turns, self._special)) is not None:
            raise Refused(400, special, "messages")
        has_picture = any(isinstance(part, PicturePart) for part in asked.messages[0].content)
        turns[0]["text"] = question(turns[0]["text"], has_picture)
        for place, turn in enumerate(turns):
            if not turn["text"].strip():
                raise Refused(400, "it says nothing", f"messages.{place}.content")
        return turns

    def _picture(self, asked: ChatRequest) -> BytesIO | None:
        """The bytes of the one picture, if there is one; its size is checked."""
        found = [
            (f"messages.{place}.content.{number}.image_url.url", part.image_url.url)
            for place, message in enumerate(asked.messages)
            for number, part in enumerate(message.content)
            if isinstance(part, PicturePart)
        ]
        if not found:
            return None
        param, url = found[0]
        if len(found) > 1 or not param.startswith("messages.0."):
            raise Refused(400, "a conversation has one picture, in its first message", found[-1][0])
        picture = _bytes_of(url, param)
        try:
            side = max(size_of(picture))
        except DataError as error:
            raise Refused(400, error.problem.reason, param, "invalid_image") from error
        if side * side > self._limits.pixels:
            reason = f"the square around the picture has {side * side} pixels; at most {self._limits.pixels} are read"
            raise Refused(413, reason, param, "image_too_large")
        return picture

    def _encoded(self, turns: list[Turn], picture: BytesIO | None, encoding: Encoding) -> dict[str, Tensor]:
        try:
            encoded = encode_prompt(self._processor, turns, None if picture is None else open_square(picture, encoding))
        except DataError as error:
            raise Refused(400, error.problem.reason, "messages.0.content", "invalid_image") from error
        except ValueError as error:
            raise Refused(400, str(error), "messages") from error
        except MemoryError as error:
            raise Refused(413, "too little memory to read it; send less", "messages") from error
        if (length := len(encoded["input_ids"])) > self._limits.prompt_tokens:
            raise self._too_long(f"{length} tokens")
        return encoded

    def _too_long(self, length: str) -> Refused:
        reason = f"the prompt has {length}; at most {self._limits.prompt_tokens} are read"
        return Refused(400, reason, "messages", "context_length_exceeded")


def _ways(model: Offered, has_picture: bool) -> tuple[Geometry, ...]:
    """How the picture may have to be squared, as a chat does it."""
    geometries, task = model.learned.geometries, model.task
    if task is not None and task >= 0:
        return (geometries[task],)
    distinct = tuple(dict.fromkeys(geometries))
    return distinct if task is None and has_picture else distinct[:1]


def _bytes_of(url: str, param: str) -> BytesIO:
    """What a data: URL holds."""
    head, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:[\w.+/-]{0,80};base64", head, re.IGNORECASE):
        reason = "pictures are taken as data:image/...;base64,... alone; no address or path is ever opened"
        raise Refused(400, reason, param, "invalid_image_url")
    try:
        return BytesIO(base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"the data: URL is not base64 ({error})", param, "invalid_image_url") from error
