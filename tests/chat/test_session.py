"""A chat is the evaluation's way to an answer, streamed: same verdict, same words."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from PIL import Image
from tiny import Lesson

from llava_cmoe.chat import opening
from llava_cmoe.chat import session as chat
from llava_cmoe.chat.location import tasks_and_scores
from llava_cmoe.chat.session import ChatSession, open_session
from llava_cmoe.data.problems import DataError
from llava_cmoe.evaluation.answer_end import answer_texts
from llava_cmoe.evaluation.generate import EvalModel, Route, answer_batch, greedy
from llava_cmoe.merging.search import merge_run
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.sequence import learn
from llava_cmoe.settings.base import RecipeError

TASKS = ("colours", "sides")


@pytest.fixture(scope="module")
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("cmoe")


@pytest.fixture(scope="module")
def talk(lesson: Lesson) -> ChatSession:
    return open_session(lesson.recipe.run)


def asked(lesson: Lesson, task: str, index: int) -> tuple[Path | None, str]:
    """Picture, if there is one, and question of an evaluation row."""
    row = lesson.run.eval_spec.rows[task][index]
    return row["image"] and Path(row["image"]), row["turns"][0]["text"].removeprefix("<image>\n")


@pytest.mark.parametrize("task", range(2))
@pytest.mark.parametrize("index", [0, 1, 3])  # the fourth of the first task shows no picture
def test_chat_answers_as_the_evaluation_does(task: int, index: int, lesson, talk, monkeypatch):
    questions = lesson.questions[TASKS[task]]
    monkeypatch.setattr(chat, "LONGEST_ANSWER", questions.max_new_tokens)
    method, processor = lesson.run.method, lesson.run.backbone.processor
    route = Route("located", task_index=task, num_known=2, seed=0)
    [wanted] = answer_batch(EvalModel(method, method.model, processor), questions, [index], route)
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


def test_a_question_waits_for_the_answer_before_it_to_end(lesson, talk, monkeypatch):
    """They share a model and its plan; whoever asks need not have read the last answer."""
    at_work, overlaps = list[str](), list[str]()
    answer, read = ChatSession._answer, ChatSession._read

    def watched(name, method):
        def call(*args):
            overlaps.extend(at_work)
            at_work.append(name)
            try:
                return method(*args)
            finally:
                at_work.remove(name)

        return call

    monkeypatch.setattr(ChatSession, "_answer", watched("answering", answer))
    monkeypatch.setattr(ChatSession, "_read", watched("reading", read))
    replies = [talk.ask(*asked(lesson, "sides", index)) for index in range(4)]
    alone = [talk.ask(*asked(lesson, "sides", index)) for index in range(4)]
    assert ["".join(one.pieces) for one in replies] == ["".join(one.pieces) for one in alone]
    assert overlaps == []


@torch.no_grad()
@pytest.mark.parametrize("task", [0, 1, -1])
def test_a_named_task_answers_with_its_own_routers(task: int, lesson, talk, monkeypatch):
    questions = lesson.questions["sides"]
    monkeypatch.setattr(chat, "LONGEST_ANSWER", questions.max_new_tokens)
    method, processor = lesson.run.method, lesson.run.backbone.processor
    picture, question = asked(lesson, "sides", 0)
    batch = talk._batch(picture, [{"role": "user", "text": f"<image>\n{question}"}], "pad")
    with method.answering(batch, torch.tensor([task])):
        tokens = method.model.generate(**batch, **greedy(method.model, processor, questions.max_new_tokens))
    reply = talk.ask(picture, question, task=task)
    [wanted] = answer_texts(tokens[:, batch["input_ids"].shape[1] :], method.model, processor)
    assert "".join(reply.pieces).strip() == wanted and reply.verdict is None


def test_a_conversation_is_located_by_its_first_question_and_reads_all_that_was_said(lesson, talk, monkeypatch):
    picture, first = asked(lesson, "colours", 0)
    _, other = asked(lesson, "sides", 0)
    said = [{"role": "user", "text": first}, {"role": "assistant", "text": "red"}]
    read: list[int] = []
    monkeypatch.setattr(ChatSession, "_answer", watching(ChatSession._answer, read))
    alone, later, after = (
        talk.ask(picture, first), talk.ask(picture, other), talk.ask(picture, other, said)
    )  # fmt: skip
    for reply in (alone, later, after):
        list(reply.pieces)
    assert after.verdict == alone.verdict != later.verdict
    assert read[2] > max(read[0], read[1])


def watching(answer: Callable, read: list[int]) -> Callable:
    """`ChatSession._answer`, which notes how many tokens it reads."""

    def call(self, prompt, *rest):
        read.append(prompt["input_ids"].shape[1])
        return answer(self, prompt, *rest)

    return call


def test_an_answer_ends_when_nobody_wants_to_hear_it(lesson, talk, monkeypatch):
    monkeypatch.setattr(chat, "greedy", lambda *_: {"do_sample": False, "min_new_tokens": 400, "max_new_tokens": 400})
    reply = talk.ask(*asked(lesson, "sides", 0), task=0)
    next(reply.pieces)
    reply.stop.set()
    list(reply.pieces)  # would not end for long
    assert sum(next(iter(reply.used().values())).values()) == pytest.approx(1)
    assert reply.used.args[1][0].shape[1] < 400  # the tokens in all


def test_what_was_used_are_shares_of_the_located_tasks_experts(lesson, talk, lesson_of):
    reply = talk.ask(*asked(lesson, "colours", 0))
    list(reply.pieces)
    used = reply.used()
    assert list(used) == list(lesson.run.method.host.banks)
    assert reply.verdict.task is not None
    task = TASKS.index(reply.verdict.task)
    for site, shares in used.items():
        assert tuple(shares) == lesson.run.method.host.banks[site].router.known[task]
        assert sum(shares.values()) == pytest.approx(1)
    plain = open_session(lesson_of("sequential_lora").recipe.run).ask(*asked(lesson, "sides", 0))
    list(plain.pieces)
    assert plain.used() == {}


def test_a_conversation_without_end_is_refused(lesson, talk, monkeypatch):
    monkeypatch.setattr(chat, "LONGEST_PROMPT", 30)
    said = [{"role": role, "text": "red " * 9} for _ in range(4) for role in ("user", "assistant")]
    with pytest.raises(DataError, match=r"it has \d+ tokens, and at most 30 are read"):
        talk.ask(None, "And now?", said)


# Where tasks square pictures in different ways.


@pytest.fixture(scope="module")
def two_ways(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence file whose second task crops pictures, which the first one pads."""
    document = yaml.safe_load((tiny_data / "sequence.yaml").read_text())
    document["tasks"][1]["geometry"] = "crop"
    path = tmp_path_factory.mktemp("two_ways") / "sequence.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def lesson_in_two_ways(tiny_data, tiny_backbone, two_ways, tmp_path_factory) -> Lesson:
    run = tmp_path_factory.mktemp("run") / "run"
    # The mean over all tokens has much of the picture in it; the closest task is taken, however far.
    locator = ("method.locator.feature=mean", "method.locator.unseen_threshold=1e9")
    words = (f"data.sequence={two_ways}", "evaluation.routes=[located]", *locator)
    return tiny.attend(tiny.recipe(run, tiny_data, tiny_backbone, "cmoe", *words))


@pytest.fixture
def talk_in_two_ways(lesson_in_two_ways: Lesson) -> ChatSession:
    return open_session(lesson_in_two_ways.recipe.run)


def wide(folder: Path) -> Path:
    """A picture that is another one padded than cropped."""
    picture = Image.new("RGB", (60, 24), "red")
    picture.paste("blue", (18, 0, 42, 24))
    picture.save(folder / "wide.png")
    return folder / "wide.png"


@pytest.mark.parametrize("task", range(2))
@pytest.mark.parametrize("index", [0, 2, 3])
def test_a_picture_is_squared_as_the_task_squares_it_that_it_is_located_at(
    task: int, index: int, lesson_in_two_ways, talk_in_two_ways, monkeypatch
):
    """The score tells which way: the evaluation squares each task's pictures as the task does."""
    lesson, questions = lesson_in_two_ways, lesson_in_two_ways.questions[TASKS[task]]
    monkeypatch.setattr(chat, "LONGEST_ANSWER", questions.max_new_tokens)
    method, processor = lesson.run.method, lesson.run.backbone.processor
    route = Route("located", task_index=task, num_known=2, seed=0)
    [wanted] = answer_batch(EvalModel(method, method.model, processor), questions, [index], route)
    assert wanted.located == task
    reply = talk_in_two_ways.ask(*asked(lesson, TASKS[task], index))
    assert reply.verdict.scores[TASKS[task]] == wanted.score and reply.verdict.task == TASKS[task]
    assert "".join(reply.pieces).strip() == wanted.text
    picture, question = asked(lesson, TASKS[task], index)
    if picture is not None:  # squared the other way it is another picture
        turns = [{"role": "user", "text": f"<image>\n{question}"}]
        other = talk_in_two_ways._batch(picture, turns, ("crop", "pad")[task])
        [(_, score)] = tasks_and_scores(lesson.run.method, other)
        assert score != wanted.score


@pytest.mark.parametrize(
    ("located", "taken"),
    [
        ({"pad": (0, 5.0), "crop": (0, 1.0)}, "pad"),  # the only way that agrees with its task
        ({"pad": (1, 1.0), "crop": (1, 5.0)}, "crop"),
        ({"pad": (0, 5.0), "crop": (1, 1.0)}, "crop"),  # both do: the closest task
        ({"pad": (0, 1.0), "crop": (1, 5.0)}, "pad"),
        ({"pad": (-1, 9.0), "crop": (1, 5.0)}, "crop"),  # a task that fits before the base model
        ({"pad": (0, 5.0), "crop": (-1, 1.0)}, "pad"),
        ({"pad": (-1, 1.0), "crop": (-1, 1.0)}, "pad"),
        ({"pad": (1, 5.0), "crop": (-1, 1.0)}, "crop"),
        ({"pad": (1, 5.0), "crop": (0, 1.0)}, None),
    ],
)
def test_of_several_ways_the_one_that_agrees_with_its_task_is_taken_or_the_picture_refused(
    located, taken, talk_in_two_ways, tmp_path, monkeypatch
):
    picture, turns = wide(tmp_path), [{"role": "user", "text": "<image>\nWhich side?"}]
    ways = {way: talk_in_two_ways._batch(picture, turns, way)["pixel_values"] for way in ("pad", "crop")}
    assert not torch.equal(ways["pad"], ways["crop"])

    def told(method, batch):
        return [next(located[way] for way, pixels in ways.items() if torch.equal(batch["pixel_values"], pixels))]

    monkeypatch.setattr(chat, "tasks_and_scores", told)
    if taken is None:
        with pytest.raises(DataError, match=r"wide\.png.*its task cannot be told.*square the picture yourself"):
            talk_in_two_ways.ask(picture, "Which side?")
    else:
        assert torch.equal(talk_in_two_ways._read(picture, turns, None)[0]["pixel_values"], ways[taken])


def test_text_alone_needs_no_way_and_one_learned_task_has_but_one(lesson_in_two_ways, tmp_path, monkeypatch):
    sessions = [open_session(lesson_in_two_ways.recipe.run, after) for after in (2, 1)]
    monkeypatch.setattr(chat, "tasks_and_scores", lambda *_: pytest.fail("located for nothing"))
    assert "pixel_values" not in sessions[0]._read(None, [{"role": "user", "text": "Which side?"}], None)[0]
    picture, turns = wide(tmp_path), [{"role": "user", "text": "<image>\nWhich side?"}]
    padded = sessions[1]._batch(picture, turns, "pad")["pixel_values"]
    assert torch.equal(sessions[1]._read(picture, turns, None)[0]["pixel_values"], padded)


def test_a_method_that_does_not_locate_is_refused_before_a_model_is_loaded(
    two_ways, tiny_data, tiny_backbone, tmp_path, monkeypatch
):
    words = (f"data.sequence={two_ways}", "data.train_rows=4", "data.eval_rows=2", "evaluation.routes=[oracle]")
    run = tmp_path / "run"
    learn(tiny.recipe(run, tiny_data, tiny_backbone, "sequential_lora", *words))
    assert open_session(run, after=1).ask(None, "Which side?").verdict is None  # one task, one way
    monkeypatch.setattr(opening, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))
    with pytest.raises(RecipeError, match=r"square pictures differently \(crop, pad\), and method sequential_lora"):
        open_session(run)


def test_a_merge_answers_for_all_stages_or_is_refused(lesson_of, tmp_path, monkeypatch):
    lesson = lesson_of("cmoe", "data.train_rows=18")
    run = Path(shutil.copytree(lesson.recipe.run, tmp_path / "run"))
    merge_run(lesson.recipe.model_copy(update={"run": run}), bound=1e9, num_rows=4)
    assert open_session(run, after=2, merge=1)._method.host.banks
    monkeypatch.setattr(opening, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))
    with pytest.raises(RegistryError, match="merge 1 is of all 2 learned stages; leave out --after"):
        open_session(run, after=1, merge=1)
    with pytest.raises(RegistryError, match="there is no merge 9; there is 1"):
        open_session(run, merge=9)
    with pytest.raises(RegistryError, match="2 stages are learned, not 99"):
        open_session(run, after=99)
