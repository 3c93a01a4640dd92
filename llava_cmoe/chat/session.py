"""Asks a run about one picture: locates the question's task, then streams the answer with that task's routers.

Who reads the question and shows the answer is not known here; the terminal is `terminal.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from llava_cmoe.backbones.loading import Backbone, load_backbone
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import encode_prompt
from llava_cmoe.data.encoding import open_square
from llava_cmoe.data.rows import MARKER, Turn
from llava_cmoe.data.tasks import Geometry, load_sequence
from llava_cmoe.methods.base import Method
from llava_cmoe.records import Mixture
from llava_cmoe.registry.restore import restore_method
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


def open_session(run: Path, after: int | None = None) -> ChatSession:
    """Talk to a run as it is now, or as it was after its first `after` stages.

    Raises:
        RegistryError: no run in this folder, fewer stages are learned, or a file is damaged.
    """
    registry = Registry(run)
    recipe = registry.recipe()
    backbone = load_backbone(recipe.backbone)
    backbone.model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    method = restore_method(recipe, backbone, registry, after)
    names = [record.name for record in registry.records()[:after]]
    return ChatSession(method, backbone, names, load_sequence(recipe.data.sequence).tasks[0].geometry)


class ChatSession:
    """A learned method and its backbone; every question is located anew, earlier ones are not remembered."""

    def __init__(self, method: Method, backbone: Backbone, names: Sequence[str], geometry: Geometry = "pad") -> None:
        """Talk to what is learned.

        Args:
            method: with every task restored that shall be known.
            backbone: the one that the method sits on.
            names: of the known tasks, in the order in which they were learned.
            geometry: how pictures became square while learning.
        """
        self._method, self._processor, self._names, self._geometry = method, backbone.processor, names, geometry
        method.model.eval()  # type: ignore[no-untyped-call]

    def ask(self, image: Path, question: str) -> Reply:
        """Locate now, answer while the reply is read.

        Raises:
            DataError: the picture is missing, broken or too large.
        """
        turns: list[Turn] = [{"role": "user", "text": f"{MARKER}\n{question}"}]
        encoded = encode_prompt(self._processor, turns, open_square(image, self._processor, self._geometry))
        batch = Collator(self._tokenizer.pad_token_id, "left")([encoded])
        prompt = {name: tensor.to(self._method.model.device) for name, tensor in batch.items()}
        located = self._method.locate(prompt)
        if located is None:
            return Reply(None, self._stream(prompt, None))
        task, scores = int(located.task_B[0]), located.score_BN[0].tolist()
        by_name = dict(sorted(zip(self._names, scores, strict=True), key=lambda item: item[1]))
        verdict = Verdict(self._names[task] if task >= 0 else None, by_name)
        return Reply(verdict, self._stream(prompt, located.choice))

    def _stream(self, prompt: dict[str, Tensor], choice: Tensor | Mixture | None) -> Iterator[str]:
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ThreadPoolExecutor(max_workers=1) as pool:
            generating = pool.submit(self._generate, prompt, choice, streamer)
            yield from streamer
            generating.result()  # an error over there is an error here

    def _generate(
        self, prompt: dict[str, Tensor], choice: Tensor | Mixture | None, streamer: TextIteratorStreamer
    ) -> None:
        model: Any = self._method.model
        end = model.generation_config.eos_token_id
        try:
            with self._method.routed(choice):
                model.generate(
                    **prompt,
                    streamer=streamer,
                    max_new_tokens=LONGEST_ANSWER,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                    pad_token_id=self._tokenizer.pad_token_id,
                    eos_token_id=self._tokenizer.eos_token_id if end is None else end,
                )
        finally:
            streamer.end()  # type: ignore[no-untyped-call]  # whoever reads the stream waits for its end, also after an error

    @property
    def _tokenizer(self) -> Any:
        return self._processor.tokenizer
