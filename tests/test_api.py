"""The public functions: light to import, and a model that answers a batch as an evaluation answers its questions."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TASKS, Lesson
from torch import Tensor

import llava_cmoe
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.data.problems import DataError
from llava_cmoe.evaluation.log import comparable, read_answers
from llava_cmoe.export.learned_model import LearnedModel


@pytest.fixture(scope="module")
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("cmoe")


@pytest.fixture(scope="module")
def run(lesson: Lesson) -> LearnedModel:
    return llava_cmoe.load(lesson.recipe.run)


def mixed(lesson: Lesson) -> list[dict[str, Tensor]]:
    """All questions of both tasks, by turns."""
    sets = [lesson.questions[task].prompts for task in TASKS]
    return [rows[index] for index in range(len(sets[0])) for rows in sets]


def collated(lesson: Lesson, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return Collator(tokenizer_of(lesson.run.backbone.processor).pad_token_id, "left")(rows)


def test_importing_the_package_does_not_wait_for_torch():
    heavy = "import sys, llava_cmoe; assert 'load' in dir(llava_cmoe); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'forget'"):
        llava_cmoe.forget  # noqa: B018  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [1, 5, 12])
def test_each_prompt_of_a_batch_is_answered_as_evaluation_answered_it(size: int, lesson: Lesson, run: LearnedModel):
    paths = [lesson.run.eval_spec.answers_path(1, task, "located") for task in range(len(TASKS))]
    said = [answer for both in zip(*map(read_answers, paths), strict=True) for answer in both]
    longest = lesson.questions[TASKS[0]].max_new_tokens
    for begin in range(0, len(said), size):
        batch = collated(lesson, mixed(lesson)[begin : begin + size])
        wanted = said[begin : begin + size]
        tokens_BT = run.generate(**batch, max_new_tokens=longest)
        assert run.answers(tokens_BT, **batch) == [answer.text for answer in wanted]
        places = [None if answer.located is None or answer.located < 0 else TASKS[answer.located] for answer in wanted]
        assert run.locate(**batch) == places


def test_a_given_task_answers_as_the_oracle_route(lesson: Lesson, run: LearnedModel):
    for task, name in enumerate(TASKS):
        asked = lesson.questions[name]
        batch = collated(lesson, [asked.prompts[index] for index in range(len(asked.ids))])
        tokens_BT = run.generate(**batch, tasks=[name] * len(asked.ids), max_new_tokens=asked.max_new_tokens)
        said = read_answers(lesson.run.eval_spec.answers_path(1, task, "oracle"))
        assert run.answers(tokens_BT, **batch) == [answer.text for answer in said]


def test_prompts_are_encoded_as_an_evaluation_encodes_them(lesson: Lesson, run: LearnedModel):
    rows = [row for task in TASKS for row in lesson.run.eval_spec.rows[task]]
    wanted = collated(lesson, [question.prompts[index] for question in lesson.questions.values() for index in range(6)])
    found = run.prompts([row["turns"][0]["text"] for row in rows], [row["image"] for row in rows])
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ["colors", "sides"]}, "no task 'colors' is learned; there is base, colours, sides"),
        ({"tasks": ["sides"]}, "1 tasks for 2 prompts"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}, "pad on the left"),
    ],
)
def test_a_batch_that_would_be_answered_wrongly_is_refused(given: dict[str, Any], message: str, run: LearnedModel):
    with pytest.raises(ValueError, match=message):
        run.generate(**{"input_ids": torch.full((2, 3), 5)} | given)


def test_a_prompt_is_text_and_a_picture_is_there(run: LearnedModel, tmp_path: Path):
    with pytest.raises(DataError, match="special token"):
        run.prompts(["What is </s>?"])
    with pytest.raises(DataError, match="missing.png"):
        run.prompts(["What is it?"], [tmp_path / "missing.png"])
    with pytest.raises(ValueError):
        run.prompts(["What is it?", "And this?"], [None])


def test_what_locates_nothing_says_so_and_answers(lesson_of: Callable[[str], Lesson]):
    run = llava_cmoe.load(lesson_of("sequential_lora").recipe.run)
    prompts = run.prompts(["Which colour is it?"])
    assert run.tasks == () and run.locate(**prompts) == [None]
    assert run.generate(**prompts, max_new_tokens=2).shape[1] > prompts["input_ids"].shape[1]


def test_a_finished_run_is_neither_learned_nor_asked_again(lesson: Lesson):
    assert comparable(llava_cmoe.learn(lesson.recipe)) == comparable(lesson.results)
    assert comparable(llava_cmoe.evaluate(lesson.recipe.run)) == comparable(lesson.results)


def test_a_loaded_run_talks_as_it_generates(run: LearnedModel):
    reply, prompts = run.chat().ask(None, "Which colour is it?"), run.prompts(["Which colour is it?"])
    assert reply.verdict is not None and [reply.verdict.task] == run.locate(**prompts)
    assert ["".join(reply.pieces).strip()] == run.answers(run.generate(**prompts), **prompts)
