"""Asks a run about one picture, or none: locates the question's task, then streams the answer with that task's routers.

Who reads the question and shows the answer is not known here; the terminal is `terminal.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from llava_cmoe.backbones.loading import Backbone, load_backbone
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import encode_prompt, tokenizer_of
from llava_cmoe.data.encoding import open_square
from llava_cmoe.data.rows import MARKER, Turn
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.data.tasks import Geometry
from llava_cmoe.evaluation.generate import greedy
from llava_cmoe.methods.base import LateVerdict, Method
from llava_cmoe.records import Located
from llava_cmoe.registry.restore import restore_merge, restore_method
from llava_cmoe.registry.store import Registry

LONGEST_ANSWER = 128
"""Tokens after which an answer is cut off; a task's own limit would need its name before it is located."""


@dataclass(frozen=True)
class Verdict:
    """What the locator said about one question.

    Attributes:
        task: name of the task whose routers answer; None where no task fits and the base model answers.
        scores: every known task's score, the closest task (the lowest score) first.
    """

    task: str | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Reply:
    """The locator's verdict (None from a method that locates nothing), and the answer's text as it is generated."""

    verdict: Verdict | None
    pieces: Iterator[str]


def open_session(run: Path, after: int | None = None, merge: int | None = None) -> ChatSession:
    """Talk to a run as it is now, or as it was after its first `after` stages, or as its merge `merge` makes it.

    Raises:
        RegistryError: no run in this folder, fewer stages are learned, or a file is damaged.
    """
    registry = Registry(run)
    recipe = registry.recipe()
    backbone = load_backbone(recipe.backbone)
    backbone.model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    method = restore_method(recipe, backbone, registry, after)
    if merge is not None:
        restore_merge(method, registry, merge)
    names = [record.name for record in registry.records()[:after]]
    geometry = load_sequence(recipe.data.sequence).tasks[0].geometry
    return ChatSession(method, backbone, names, geometry, recipe.data.max_pixels)


class ChatSession:
    """A learned method and its backbone; every question is located anew, earlier ones are not remembered."""

    def __init__(
        self,
        method: Method,
        backbone: Backbone,
        names: Sequence[str],
        geometry: Geometry = "pad",
        max_pixels: int | None = None,
    ) -> None:
        """Talk to what is learned.

        Args:
            method: with every task restored that shall be known.
            backbone: the one that the method sits on.
            names: of the known tasks, in the order in which they were learned.
            geometry: how pictures became square while learning.
            max_pixels: largest picture while learning.
        """
        self._method, self._processor, self._names = method, backbone.processor, names
        self._geometry, self._max_pixels = geometry, max_pixels
        self._worker = ThreadPoolExecutor(max_workers=1)  # one answer after another: they share a model and its plan
        method.model.eval()  # type: ignore[no-untyped-call]

    def ask(self, image: Path | None, question: str) -> Reply:
        """Read the question, about a picture or not, and locate it; the answer goes on while the reply is read.

        Raises:
            DataError: the picture is missing, broken or too large, or the backbone reads text alone.
        """
        encoded = self._encoded(image, question)
        batch = Collator(self._tokenizer.pad_token_id, "left")([encoded])
        prompt = {name: tensor.to(self._method.model.device) for name, tensor in batch.items()}
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        late: list[LateVerdict] = []
        answering = self._worker.submit(self._answer, prompt, streamer, late)
        # Whoever reads the stream waits for its end, also after an error.
        answering.add_done_callback(lambda _: streamer.end())  # type: ignore[no-untyped-call]
        first = next(streamer)  # comes when the prompt has been read, hence located, or with the end
        if answering.done():
            answering.result()  # an error over there is an error here
        return Reply(self._verdict(late[0]()), chain([first], _rest(streamer, answering)))

    def _encoded(self, image: Path | None, question: str) -> dict[str, Tensor]:
        if image is None:
            return encode_prompt(self._processor, [{"role": "user", "text": question}], None)
        turns: list[Turn] = [{"role": "user", "text": f"{MARKER}\n{question}"}]
        square = open_square(image, self._processor, self._geometry, self._max_pixels)
        return encode_prompt(self._processor, turns, square)

    def _verdict(self, located: Located | None) -> Verdict | None:
        if located is None:
            return None
        task, scores = int(located.task_B[0]), located.score_BN[0].tolist()
        by_name = dict(sorted(zip(self._names, scores, strict=True), key=lambda item: item[1]))
        return Verdict(self._names[task] if task >= 0 else None, by_name)

    def _answer(self, prompt: dict[str, Tensor], streamer: TextIteratorStreamer, late: list[LateVerdict]) -> None:
        model: Any = self._method.model
        with self._method.locating(prompt) as verdict:
            late.append(verdict)
            model.generate(**prompt, streamer=streamer, **greedy(model, self._tokenizer, LONGEST_ANSWER))

    @property
    def _tokenizer(self) -> Any:
        return tokenizer_of(self._processor)


def _rest(streamer: TextIteratorStreamer, answering: Future[None]) -> Iterator[str]:
    yield from streamer
    answering.result()
