"""A run as a model for programs: `generate` routes each prompt of a batch by the task that it is located at.

What locating and routing are is the method's (`Method.answering`), which evaluation opens around `generate` in the same
way. Shape letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_cmoe.chat.location import NO_WAY, agreeing_way, tasks_and_scores
from llava_cmoe.chat.opening import LearnedRun
from llava_cmoe.chat.session import LONGEST_ANSWER, ChatSession
from llava_cmoe.data.batches import on_device
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import Processor, encode_prompt, tokenizer_of
from llava_cmoe.data.encoding import Encoding, open_square
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.rows import Turn, question
from llava_cmoe.data.special_tokens import special_texts, why_special
from llava_cmoe.data.tasks import Geometry
from llava_cmoe.evaluation.answer_end import answer_texts
from llava_cmoe.evaluation.generate import greedy
from llava_cmoe.settings.base import shown

BASE = "base"
"""Instead of a task's name: the model without experts."""


class LearnedModel:
    """What a run has learned, on its backbone, in evaluation mode.

    Attributes:
        learned: the run: its method, backbone and tasks.
    """

    def __init__(self, learned: LearnedRun) -> None:
        """Take a run that is loaded."""
        self.learned = learned
        learned.method.model.eval()  # type: ignore[no-untyped-call]

    @property
    def processor(self) -> Processor:
        """The backbone's; the tokenizer of one that reads text alone."""
        return self.learned.backbone.processor

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.learned.method.model.device

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names that `generate` may be given, in the order learned; none where a method answers all alike."""
        return tuple(self.learned.names) if self.learned.method.locates else ()

    def prompts(self, questions: Sequence[str], pictures: Sequence[Path | str | None] = ()) -> dict[str, Tensor]:
        """Questions as the tasks ask theirs: chat template, squared pictures, padded on the left; (B, T).

        Args:
            questions: one each.
            pictures: files, one for each question or None; none at all if absent.

        Raises:
            DataError: a picture is missing or broken, or a question holds a special token.
            ValueError: not as many pictures as questions.
        """
        files = [None if file is None else Path(file) for file in pictures or [None] * len(questions)]
        return self._batch([self._row(*asked) for asked in zip(questions, files, strict=True)])

    @torch.no_grad()
    def generate(self, *, tasks: Sequence[str] | None = None, **given: Any) -> Tensor:
        """Tokens (B, T) of prompts and answers, as `generate` of transformers returns them.

        Each prompt is located by itself, once, and no batch mate changes where. Greedy unless arguments say otherwise.

        Args:
            tasks: instead of locating, the task of each prompt, or `base` for the model without experts.
            given: tensors of the batch, padded on the left, as `prompts` or a processor makes them; and arguments of
                transformers' `generate`.

        Raises:
            ValueError: padded on the right, or a task that the run has not learned.
        """
        batch = on_device({name: value for name, value in given.items() if isinstance(value, Tensor)}, self.device)
        mask_BT = batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        if not bool(mask_BT[:, -1].all()):
            raise ValueError("the prompts are padded on the right; answers begin there, so pad on the left")
        arguments = {name: value for name, value in given.items() if name not in batch}
        model: Any = self.learned.method.model
        with self.learned.method.answering(batch, self._indices(tasks, len(mask_BT))):
            tokens_BT: Tensor = model.generate(**batch, **(greedy(model, self.processor, LONGEST_ANSWER) | arguments))
        return tokens_BT

    @torch.no_grad()
    def locate(self, **batch: Tensor) -> list[str | None]:
        """The task that each prompt is located at; None where no task fits, and throughout where a run locates none."""
        inputs = on_device(batch, self.device)
        if not self.learned.method.locates:
            return [None] * len(inputs["input_ids"])
        found = tasks_and_scores(self.learned.method, inputs)
        return [self.learned.names[task] if task >= 0 else None for task, _ in found]

    def answers(self, tokens_BT: Tensor, **batch: Tensor) -> list[str]:
        """The answers in letters, up to their ends; `batch` are the prompts that these tokens go on from."""
        return answer_texts(tokens_BT[:, batch["input_ids"].shape[1] :], self.learned.method.model, self.processor)

    def chat(self) -> ChatSession:
        """A conversation with it, as `llava-cmoe chat` holds one."""
        return ChatSession(self.learned)

    def _row(self, text: str, picture: Path | None) -> dict[str, Tensor]:
        """A prompt, its picture squared as the task squares pictures that it is located at."""
        turns: list[Turn] = [{"role": "user", "text": question(text, picture is not None)}]
        if (reason := why_special(turns, special_texts(self.processor))) is not None:
            raise DataError(Problem(Path("question"), reason))
        geometries = self.learned.geometries
        ways: Sequence[Geometry] = list(dict.fromkeys(geometries))
        if picture is None:
            return encode_prompt(self.processor, turns, None)
        rows: dict[Geometry, dict[str, Tensor]] = {}
        for way in ways:
            encoding = Encoding(self.processor, way, self.learned.max_pixels)
            rows[way] = encode_prompt(self.processor, turns, open_square(picture, encoding))
        if len(ways) == 1:
            return rows[ways[0]]
        located = {way: tasks_and_scores(self.learned.method, self._batch([row]))[0] for way, row in rows.items()}
        chosen = agreeing_way(located, geometries)
        if chosen is None:
            raise DataError(Problem(picture, NO_WAY))
        return rows[chosen]

    def _batch(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return on_device(Collator(tokenizer_of(self.processor).pad_token_id, "left")(rows), self.device)

    def _indices(self, tasks: Sequence[str] | None, num_prompts: int) -> Tensor | None:
        """Task indices (B,), -1 for the base model; None where prompts are to be located."""
        if tasks is None:
            return None
        if len(tasks) != num_prompts:
            raise ValueError(f"{len(tasks)} tasks for {num_prompts} prompts; name one for each")
        known = {BASE: -1} | {name: place for place, name in enumerate(self.tasks)}
        if strange := [task for task in tasks if task not in known]:
            raise ValueError(f"no task {shown(strange[0])} is learned; there is {', '.join(known)}")
        return torch.tensor([known[task] for task in tasks])
