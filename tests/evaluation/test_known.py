"""What is known is not asked again, and nothing but that changes: every file is the one that asking anew would give."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cells import SEQUENCE, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Lesson
from torch import Tensor

from llava_cmoe.evaluation.eval_spec import EvalSpec
from llava_cmoe.evaluation.generate import EvalModel, EvalSet
from llava_cmoe.evaluation.log import Answer, comparable, write_answers
from llava_cmoe.evaluation.runner import evaluate_after
from llava_cmoe.methods.base import DeferredLocation
from llava_cmoe.records import Located
from llava_cmoe.sequence import evaluate_run
from llava_cmoe.settings.evaluation import EvaluationSettings

ROWS = {name: make_rows(name) for name in SEQUENCE.names}
ROUTES = ("located", "oracle", "random")
TASKS = range(len(SEQUENCE.tasks))
EXAMPLES = settings(max_examples=15)
Asked = list[tuple[int, int, int | None]]
Evaluate = Callable[..., tuple[Asked, dict[str, bytes]]]


UNREADABLE, MUTE = -1, 900
"""Prompts that cannot be read, and that can be located and not answered."""


class Killed(Exception):
    """Stands for SIGKILL."""


class Prompts(list[int]):
    """Prompts of one number each; `UNREADABLE` cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        number = super().__getitem__(index)
        if number == UNREADABLE:
            raise ValueError("a broken picture")
        ids_T = torch.full((1 + number % 3,), number + 10)
        return {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T)}


@dataclass
class Speaker:
    """A method and its model in one, whose answer is a digest of the prompt and whatever else the answer hangs on.

    Attributes:
        locates: it makes a difference which task is given.
        answers_by_task: it is evaluated as a method that answers by task.
        changes: an answer also hangs on how many tasks are learned.
        herds: an answer also hangs on who shares the batch, as the last bits of a logit may.
        lives: calls of `locate` and `generate` until it dies.
        asked: tasks learned, prompt and task of everything that it answered.
    """

    locates: bool = True
    answers_by_task: bool = True
    changes: bool = False
    herds: bool = False
    lives: int = 10_000
    num_known: int = 0
    asked: Asked = field(default_factory=list)
    device: str = "cpu"
    generation_config: Any = field(default_factory=lambda: SimpleNamespace(eos_token_id=2))
    _tasks: list[int | None] = field(default_factory=list)

    def eval(self) -> None:
        pass

    def locate(self, batch: Mapping[str, Tensor]) -> Located:
        """Anywhere, the base model included, and elsewhere as tasks are learned."""
        self._live()
        chosen = [digest(number, self.num_known // 2) % (self.num_known + 1) - 1 for number in numbers(batch)]
        score_BN = torch.tensor([[float(number + task) for task in range(self.num_known)] for number in numbers(batch)])
        return Located.at(torch.tensor(chosen), score_BN)

    @contextmanager
    def answering(self, batch: Mapping[str, Tensor], task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        located = self.locate(batch) if self.locates and task_B is None else None
        given_B = task_B if located is None else located.task_B
        self._tasks = given_B.tolist() if self.locates and given_B is not None else [None] * len(batch["input_ids"])
        yield lambda: located

    def generate(self, **prompts: Any) -> Tensor:
        self._live()
        rows = list(zip(numbers(prompts), self._tasks, strict=True))
        if MUTE in numbers(prompts):
            raise RuntimeError("too little memory")
        self.asked += [(self.num_known, number, task) for number, task in rows]
        hangs_on = (self.num_known if self.changes else 0, str(rows) if self.herds else "")
        new_BT = torch.tensor([[digest(*row, *hangs_on, place) % 300 + 4 for place in range(3)] for row in rows])
        return torch.cat([prompts["input_ids"], new_BT], dim=1)

    def _live(self) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise Killed


def numbers(batch: Mapping[str, Any]) -> list[int]:
    return [token - 10 for token in batch["input_ids"][:, -1].tolist()]


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6])


@dataclass(frozen=True)
class World:
    """Questions, and how they are asked; of each task one may have a fault."""

    num_rows: tuple[int, ...]
    batch_size: int
    routes: tuple[str, ...]
    seed: int
    faults: tuple[int | None, ...]

    def evaluate(self, folder: Path, processor: Any, num_processes: int = 1, **speaker: Any) -> Asked:
        """Ask after every task, unless killed; returns what was answered, by all processes together."""
        spec = EvalSpec(
            SEQUENCE,
            ROWS,
            folder,
            EvaluationSettings(routes=self.routes, batch_size=self.batch_size),
            self.seed,
        )
        barrier = Barrier(num_processes)

        def work(index: int) -> Asked:
            speaks = Speaker(**speaker)
            process = SimpleNamespace(
                process_index=index,
                num_processes=num_processes,
                is_main_process=index == 0,
                wait_for_everyone=partial(barrier.wait, 60),
            )
            for after in TASKS:
                speaks.num_known = after + 1
                evaluate_after(spec, self.questions(), EvalModel(speaks, speaks, processor), after, process)
            return speaks.asked

        with ThreadPoolExecutor(num_processes) as pool:
            return [pair for asked in pool.map(work, range(num_processes)) for pair in asked]

    @property
    def num_questions(self) -> int:
        """Questions of all cells of one route."""
        return sum(sum(self.num_rows[: after + 1]) for after in TASKS)

    def questions(self) -> dict[str, EvalSet]:
        made = {}
        for task, name in enumerate(SEQUENCE.names):
            prompts, fault = Prompts(100 * task + number for number in range(self.num_rows[task])), self.faults[task]
            texts = tuple(map(str, prompts))
            if fault is not None:
                prompts[1] = fault
            made[name] = EvalSet(tuple(f"q{text}" for text in texts), texts, prompts, max_new_tokens=3)
        return made


WORLDS = st.builds(
    World,
    num_rows=st.tuples(*[st.integers(3, 7)] * len(TASKS)),
    batch_size=st.integers(2, 4),
    routes=st.permutations(ROUTES).flatmap(lambda routes: st.sampled_from([tuple(routes), *([one] for one in routes)])),
    seed=st.integers(0, 9),
    faults=st.tuples(*[st.sampled_from([None, UNREADABLE, MUTE])] * len(TASKS)),
)
FAULTLESS = WORLDS.map(lambda world: replace(world, faults=(None,) * len(TASKS)))


@pytest.fixture(scope="module")
def evaluate(tiny_processor: Any) -> Iterator[Evaluate]:
    """What a speaker answered, and the files that this left, in a folder of its own unless one is named."""

    def attempt(world: World, folder: Path | None = None, **how: Any) -> tuple[Asked, dict[str, bytes]]:
        if folder is not None:
            return world.evaluate(folder, tiny_processor, **how), files(folder)
        with TemporaryDirectory() as fresh:
            return attempt(world, Path(fresh), **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # nobody pulls the plug here, and disks are slow
        yield attempt


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@EXAMPLES
@given(world=WORLDS)
def test_each_pair_of_prompt_and_task_is_answered_once_where_they_decide_an_answer(evaluate: Evaluate, world: World):
    asked, once = evaluate(world)
    asked_anew, anew = evaluate(world, answers_by_task=False)
    assert once == anew and len(once) == 6 * len(world.routes)
    pairs = [(prompt, task) for _, prompt, task in asked]
    assert len(pairs) == len(set(pairs)) and set(pairs) == {(prompt, task) for _, prompt, task in asked_anew}


@EXAMPLES
@given(world=WORLDS)
def test_each_prompt_is_answered_once_after_each_task_where_tasks_make_no_difference(evaluate: Evaluate, world: World):
    speaker = {"locates": False, "answers_by_task": False, "changes": True}
    asked, together = evaluate(world, **speaker)
    alone = [evaluate(replace(world, routes=(route,)), **speaker)[1] for route in world.routes]
    assert together == {name: answers for of_route in alone for name, answers in of_route.items()}
    assert len(asked) == len(set(asked))


@EXAMPLES
@given(world=FAULTLESS)
def test_answers_of_an_earlier_model_are_not_known_where_a_method_does_not_answer_by_task(
    evaluate: Evaluate, world: World
):
    asked, _ = evaluate(world, locates=False, answers_by_task=False, changes=True)
    assert len(asked) == world.num_questions


@EXAMPLES
@given(world=FAULTLESS)
def test_everything_is_asked_again_of_a_method_that_locates_and_changes(evaluate: Evaluate, world: World):
    asked, _ = evaluate(world, answers_by_task=False, changes=True)
    assert len(asked) == len(world.routes) * world.num_questions


@EXAMPLES
@given(world=FAULTLESS)
def test_the_oracle_asks_a_cell_per_task_and_not_one_below_the_diagonal(evaluate: Evaluate, world: World):
    asked, _ = evaluate(replace(world, routes=("oracle",)))
    assert len(asked) == sum(world.num_rows)
    assert all(after == task + 1 for after, _, task in asked)


@EXAMPLES
@given(world=WORLDS, lives=st.integers(0, 40), num_processes=st.integers(1, 3))
def test_kills_and_processes_change_no_byte_even_where_batch_mates_do(
    evaluate: Evaluate, world: World, lives: int, num_processes: int
):
    _, whole = evaluate(world, herds=True)
    assert evaluate(world, herds=True, num_processes=num_processes)[1] == whole
    with TemporaryDirectory() as folder:
        with suppress(Killed):
            evaluate(world, Path(folder), herds=True, lives=lives)
        assert evaluate(world, Path(folder), herds=True, num_processes=num_processes)[1] == whole


@EXAMPLES
@given(world=WORLDS)
def test_answers_from_before_a_task_was_learned_are_another_models(evaluate: Evaluate, world: World):
    _, own = evaluate(world)
    with TemporaryDirectory() as folder:
        for route in ROUTES:
            ids = world.questions()["OCRVQA"].ids
            foreign = [Answer(sample_id, "brought along", 2, 0.0, "?") for sample_id in ids]
            write_answers(Path(folder) / "after_02" / f"OCRVQA.{route}.jsonl", foreign)
        _, found = evaluate(world, Path(folder))
    assert {name: answers for name, answers in found.items() if b"brought along" not in answers} == own


@pytest.mark.parametrize("name", ["cmoe", "lora_per_task"])
def test_a_real_runs_files_are_those_of_asking_everything_anew(
    lesson_of: Callable[[str], Lesson], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    lesson = lesson_of(name)
    recipe = lesson.recipe.model_copy(update={"run": tmp_path / "run"})
    shutil.copytree(lesson.recipe.run, recipe.run)
    shutil.rmtree(recipe.run / "answers")
    monkeypatch.setattr(type(lesson.run.method), "answers_by_task", False)
    assert comparable(evaluate_run(recipe)) == comparable(lesson.results)
    assert files(recipe.run / "answers") == files(lesson.recipe.run / "answers")
