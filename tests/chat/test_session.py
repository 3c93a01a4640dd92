"""A chat is the evaluation's way to an answer, streamed: same verdict, same words."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import Lesson

from llava_cmoe.chat import session as chat
from llava_cmoe.chat.session import ChatSession, open_session
from llava_cmoe.data.problems import DataError
from llava_cmoe.evaluation.generate import Candidate, Route, answer_batch

TASKS = ("colours", "sides")


@pytest.fixture(scope="module")
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("cmoe")


@pytest.fixture(scope="module")
def talk(lesson: Lesson) -> ChatSession:
    return open_session(lesson.recipe.run)


def asked(lesson: Lesson, task: str, index: int) -> tuple[Path | None, str]:
    """Picture, if there is one, and question of an evaluation row."""
    row = lesson.run.exam.rows[task][index]
    return row["image"] and Path(row["image"]), row["turns"][0]["text"].removeprefix("<image>\n")


@pytest.mark.parametrize("task", range(2))
@pytest.mark.parametrize("index", [0, 1, 3])  # the fourth of the first task shows no picture
def test_chat_answers_as_the_evaluation_does(task: int, index: int, lesson, talk, monkeypatch):
    questions = lesson.questions[TASKS[task]]
    monkeypatch.setattr(chat, "LONGEST_ANSWER", questions.max_new_tokens)
    method, processor = lesson.run.method, lesson.run.backbone.processor
    route = Route("located", task_index=task, num_known=2, seed=0)
    [wanted] = answer_batch(Candidate(method, method.model, processor), questions, [index], route)
    reply = talk.ask(*asked(lesson, TASKS[task], index))
    assert "".join(reply.pieces).strip() == wanted.text
    located = None if wanted.located == -1 else TASKS[wanted.located]
    assert reply.verdict.task == located
    assert wanted.score is None or reply.verdict.scores[located] == wanted.score


def test_the_closest_task_comes_first(lesson, talk):
    scores = list(talk.ask(*asked(lesson, "sides", 0)).verdict.scores.values())
    assert scores == sorted(scores) and len(scores) == 2


def test_every_question_is_located_anew(lesson, talk):
    verdicts = [talk.ask(*asked(lesson, task, 0)).verdict for task in ("colours", "sides", "colours")]
    assert verdicts[0] == verdicts[2] != verdicts[1]


def test_a_run_can_be_asked_as_it_was_after_any_stage(lesson):
    after_one = open_session(lesson.recipe.run, after=1).ask(*asked(lesson, "sides", 0)).verdict
    assert list(after_one.scores) == ["colours"]
    nothing = open_session(lesson.recipe.run, after=0).ask(*asked(lesson, "sides", 0)).verdict
    assert nothing.task is None and not nothing.scores


def test_a_method_that_locates_nothing_answers_without_a_verdict(lesson_of, lesson):
    reply = open_session(lesson_of("sequential_lora").recipe.run).ask(*asked(lesson, "sides", 0))
    assert reply.verdict is None and isinstance("".join(reply.pieces), str)


def test_an_error_while_answering_reaches_the_reader(lesson, talk, monkeypatch):
    def fail(*args: object, **kwargs: object) -> torch.Tensor:
        raise ValueError("out of everything")

    monkeypatch.setattr(talk._method.model, "generate", fail)
    with pytest.raises(ValueError, match="out of everything"):
        list(talk.ask(*asked(lesson, "sides", 0)).pieces)


def test_a_broken_picture_is_named(talk, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png"):
        talk.ask(broken, "What is it?")
