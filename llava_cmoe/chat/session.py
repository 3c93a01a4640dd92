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
from llava_cmoe.data.batches import on_device
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import encode_prompt, end_mark, tokenizer_of
from llava_cmoe.data.encoding import Encoding, open_square
from llava_cmoe.data.images import open_image, side_of_square
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.rows import MARKER, Turn
from llava_cmoe.data.special_tokens import special_texts, why_special
from llava_cmoe.data.task_data import sequence_of
from llava_cmoe.data.tasks import Geometry
from llava_cmoe.evaluation.answer_end import until_end
from llava_cmoe.evaluation.generate import greedy
from llava_cmoe.merging.store import Merges, restore_merge
from llava_cmoe.methods import method_of
from llava_cmoe.methods.base import DeferredLocation, Method
from llava_cmoe.records import Located
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.base import RecipeError

LONGEST_ANSWER = 128
"""Tokens after which an answer is cut off; a task's own limit would need its name before it is located."""

NO_WAY = (
    "its task cannot be told: squared as one task squares pictures, it is located at another; square the picture "
    "yourself"
)
"""Why a picture is refused that `agreeing_way` finds no way for."""


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


@dataclass(frozen=True)
class LearnedRun:
    """A run that can answer.

    Attributes:
        method: with every known task restored, on the backbone, where the machine computes best.
        backbone: the one that the method sits on.
        names: of the known tasks, in the order in which they were learned.
        geometries: how pictures became square while each task was learned.
        max_pixels: largest picture while learning; any when None.
    """

    method: Method
    backbone: Backbone
    names: Sequence[str]
    geometries: Sequence[Geometry]
    max_pixels: int | None


def open_session(run: Path, after: int | None = None, merge: int | None = None) -> ChatSession:
    """Talk to a run; arguments and errors of `open_learned`."""
    learned = open_learned(run, after, merge)
    return ChatSession(learned.method, learned.backbone, learned.names, learned.geometries, learned.max_pixels)


def open_learned(run: Path, after: int | None = None, merge: int | None = None) -> LearnedRun:
    """Load a run as it is now, or as it was after its first `after` stages, or as its merge `merge` makes it.

    Raises:
        RegistryError: no run in this folder, fewer stages are learned, no such merge, or a file is damaged.
        RecipeError: tasks of the run square pictures differently, and nothing says which task a question is of.
    """
    registry = Registry(run)
    recipe, records = registry.recipe(), registry.records()
    if after is not None and after > len(records):
        raise RegistryError(f"{run}: {len(records)} stages are learned, not {after}")
    if merge is not None:
        if after is not None and after < len(records):
            raise RegistryError(f"{run}: merge {merge} is of all {len(records)} learned stages; leave out --after")
        Merges(registry).load(merge)
    names = [record.name for record in records[:after]]
    stages, tasks = method_of(recipe.method).stages(sequence_of(recipe.data).names), sequence_of(recipe.data).tasks
    geometries = [tasks[stage.after].geometry for stage in stages[: len(names)]] or [tasks[0].geometry]
    if len(set(geometries)) > 1 and not method_of(recipe.method).locates:
        raise RecipeError(
            f"{run}: its tasks square pictures differently ({', '.join(sorted(set(geometries)))}), and method "
            f"{recipe.method.name} does not find out which task a question is of; chat with a run of one geometry"
        )
    backbone = load_backbone(recipe.backbone)
    backbone.model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    method = restore_method(recipe, backbone, registry, after)
    if merge is not None:
        restore_merge(method, registry, merge)
    return LearnedRun(method, backbone, names, geometries, recipe.data.max_pixels)


def check_picture(run: Path, image: Path) -> None:
    """Find what is wrong with a picture before a backbone is loaded.

    Raises:
        DataError: the picture is missing, broken or too large.
        RegistryError: no run in this folder.
    """
    open_image(image)
    data = Registry(run).recipe().data
    for geometry in {task.geometry for task in sequence_of(data).tasks}:
        side_of_square(image, geometry, data.max_pixels)


def verdict_of(located: Located | None, row: int, names: Sequence[str]) -> Verdict | None:
    """What the locator said about one row of a batch; None where no locator decided."""
    if located is None or located.score_BN is None:
        return None
    task, scores = int(located.task_B[row]), located.score_BN[row].tolist()
    by_name = dict(sorted(zip(names, scores, strict=True), key=lambda item: item[1]))
    return Verdict(names[task] if task >= 0 else None, by_name)


@torch.no_grad()
def tasks_and_scores(method: Method, batch: dict[str, Tensor]) -> list[tuple[int, float]]:
    """The task of each prompt, -1 for none, and its score, infinite for none; without answering."""
    with method.answering(batch) as location:
        method.model.base_model(**batch, use_cache=False)
    located = location()
    assert located is not None and located.score_BN is not None, "a method that locates"
    return [
        (task, scores[task] if task >= 0 else float("inf"))
        for task, scores in zip(located.task_B.tolist(), located.score_BN.tolist(), strict=True)
    ]


def agreeing_way(located: Mapping[Geometry, tuple[int, float]], geometries: Sequence[Geometry]) -> Geometry | None:
    """The way to square a picture that agrees with the task that it is located at then; None if no way does.

    Of several the closest task's is taken; where only the base model fits, the first way that leads there.

    Args:
        located: way to the task, -1 for none, and the score of the picture squared so.
        geometries: of the known tasks.
    """
    agreeing = [way for way, (task, _) in located.items() if task >= 0 and geometries[task] == way]
    if agreeing:
        return min(agreeing, key=lambda way: located[way][1])
    return next((way for way, (task, _) in located.items() if task < 0), None)


class ChatSession:
    """A learned method and its backbone; every question is located anew, earlier ones are not remembered."""

    def __init__(
        self,
        method: Method,
        backbone: Backbone,
        names: Sequence[str],
        geometries: Sequence[Geometry] = ("pad",),
        max_pixels: int | None = None,
    ) -> None:
        """Talk to what is learned.

        Args:
            method: with every task restored that shall be known.
            backbone: the one that the method sits on.
            names: of the known tasks, in the order in which they were learned.
            geometries: how pictures became square while each task was learned.
            max_pixels: largest picture while learning.
        """
        self._method, self._processor, self._names = method, backbone.processor, names
        self._geometries, self._max_pixels = geometries, max_pixels
        self._worker = ThreadPoolExecutor(max_workers=1)  # one answer after another: they share a model and its plan
        method.model.eval()  # type: ignore[no-untyped-call]

    def ask(self, image: Path | None, question: str) -> Reply:
        """Read the question, about a picture or not, and locate it; the answer goes on while the reply is read.

        Raises:
            DataError: the picture is missing, broken or too large, the backbone reads text alone, or the question holds
                a special token.
        """
        turns: list[Turn] = [{"role": "user", "text": question}]
        if (reason := why_special(turns, special_texts(self._processor))) is not None or MARKER in question:
            raise DataError(Problem(Path("question"), reason or f"it holds {MARKER}; name the picture with --image"))
        prompt = self._worker.submit(self._prompt, image, question).result()
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        deferred: list[DeferredLocation] = []
        answering = self._worker.submit(self._answer, prompt, streamer, deferred)
        # Whoever reads the stream waits for its end, also after an error.
        answering.add_done_callback(lambda _: streamer.end())  # type: ignore[no-untyped-call]
        first = next(streamer)  # comes when the prompt has been read, hence located, or with the end
        if answering.done():
            answering.result()  # an error over there is an error here
        pieces = until_end(chain([first], _rest(streamer, answering)), end_mark(self._processor))
        return Reply(self._verdict(deferred[0]()), pieces)

    def _prompt(self, image: Path | None, question: str) -> dict[str, Tensor]:
        """The question as a batch of one, its picture squared as the task squares pictures that it is located at.

        Where several ways to square it agree with the task that is located then, the closest task is taken; where no
        task fits, the first way.
        """
        distinct = list(dict.fromkeys(self._geometries))
        if image is None or len(distinct) == 1:
            return self._batch(image, question, distinct[0])
        batches = {geometry: self._batch(image, question, geometry) for geometry in distinct}
        located = {geometry: self._located(batch) for geometry, batch in batches.items()}
        chosen = agreeing_way(located, self._geometries)
        if chosen is None:
            raise DataError(Problem(image, NO_WAY))
        return batches[chosen]

    def _batch(self, image: Path | None, question: str, geometry: Geometry) -> dict[str, Tensor]:
        turns: list[Turn] = [{"role": "user", "text": question if image is None else f"{MARKER}\n{question}"}]
        encoding = Encoding(self._processor, geometry, self._max_pixels)
        try:
            encoded = encode_prompt(self._processor, turns, None if image is None else open_square(image, encoding))
        except MemoryError as error:
            raise DataError(
                Problem(image or Path(), "too little memory to read it; ask about a smaller one")
            ) from error
        collate = Collator(self._tokenizer.pad_token_id, "left")
        return on_device(collate([encoded]), self._method.model.device)

    def _located(self, batch: dict[str, Tensor]) -> tuple[int, float]:
        """The task of a prompt, -1 for none, and its score."""
        return tasks_and_scores(self._method, batch)[0]

    def _verdict(self, located: Located | None) -> Verdict | None:
        return verdict_of(located, 0, self._names)

    def _answer(
        self, prompt: dict[str, Tensor], streamer: TextIteratorStreamer, deferred: list[DeferredLocation]
    ) -> None:
        model: Any = self._method.model
        with self._method.answering(prompt) as location:
            deferred.append(location)
            model.generate(**prompt, streamer=streamer, **greedy(model, self._processor, LONGEST_ANSWER))

    @property
    def _tokenizer(self) -> Any:
        return tokenizer_of(self._processor)


def _rest(streamer: TextIteratorStreamer, answering: Future[None]) -> Iterator[str]:
    yield from streamer
    answering.result()
