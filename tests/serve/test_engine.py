"""A batch mate changes nothing: an answer is the one that its prompt gets alone, and that the evaluation gets."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image
from serving import SMALL, Listener, asked, data_url, message, mixture

from llava_cmoe.evaluation.generate import EvalModel, Route, answer_batch
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.serve import engine as serve_engine
from llava_cmoe.serve.engine import Engine, Growing
from llava_cmoe.serve.limits import Refused
from llava_cmoe.serve.models import offered_models
from llava_cmoe.serve.prompts import Prompt, PromptReader


@pytest.fixture(scope="module")
def engine(learned) -> Engine:
    return Engine(learned)


@pytest.fixture(scope="module")
def prompts(learned, lesson) -> list[Prompt]:
    reader = PromptReader(offered_models({"run": learned}), SMALL)
    return [reader.prepare(json.dumps(body).encode()).prompt for body in mixture(lesson)]


def together(engine: Engine, prompts: Sequence[Prompt], streams: bool = False) -> list[Listener]:
    listeners = [Listener(prompt, streams) for prompt in prompts]
    engine.answer(listeners)
    return listeners


def facts(listener: Listener) -> tuple[object, ...]:
    answer = listener.answer
    rounded = {name: round(score, 3) for name, score in answer.scores.items()}
    return answer.text, answer.finish, answer.prompt_tokens, answer.answer_tokens, answer.task, answer.located, rounded


@pytest.mark.parametrize("by_task", [True, False])
def test_answers_of_a_mixed_batch_are_those_asked_alone(by_task: bool, learned, prompts, monkeypatch):
    # The tiny model seldom ends an answer; a letter that it says does it instead.
    ending = [learned.backbone.processor.tokenizer.convert_tokens_to_ids(token) for token in ("A", "</s>")]
    monkeypatch.setattr(learned.method.model.generation_config, "eos_token_id", ending)
    engine, generated = Engine(learned), list[int]()
    generate = engine._method.model.generate

    def counted(**options):
        generated.append(len(options["input_ids"]))
        return generate(**options)

    alone = [facts(together(engine, [prompt])[0]) for prompt in prompts]
    monkeypatch.setattr(engine._method.model, "generate", counted)
    monkeypatch.setattr(Cmoe, "answers_by_task", by_task)
    assert [facts(one) for one in together(engine, prompts)] == alone
    assert generated == ([6] if by_task else [3, 3])
    assert len({text for text, *_ in alone}) > 2 and {finish for _, finish, *_ in alone} == {"stop", "length"}
    assert [located for *_, located, _ in alone] == [True, False, False, True, False, True]
    assert [len(scores) for *_, scores in alone] == [2, 0, 0, 2, 0, 2]
    assert [task for *_, task, _, _ in alone][1:3] == ["colours", None]


@pytest.mark.parametrize(("task", "index"), [("colours", 0), ("colours", 3), ("sides", 1)])
def test_an_answer_is_the_evaluations(task: str, index: int, engine, learned, lesson):
    questions, place = lesson.questions[task], ("colours", "sides").index(task)
    eval_model = EvalModel(lesson.run.method, lesson.run.method.model, lesson.run.backbone.processor)
    reader = PromptReader(offered_models({"run": learned}), SMALL)
    for name, model in (("located", "run"), ("oracle", f"run:{task}")):
        route = Route(name, task_index=place, num_known=2, seed=0)  # type: ignore[arg-type]
        [wanted] = answer_batch(eval_model, questions, [index], route)
        body = {"model": model, "messages": asked(lesson, task, index), "max_tokens": questions.max_new_tokens}
        [got] = together(engine, [reader.prepare(json.dumps(body).encode()).prompt])
        assert got.answer.text == wanted.text
        if name == "located":
            assert got.answer.task == (None if wanted.located == -1 else ("colours", "sides")[wanted.located])


def test_a_stream_is_the_answer_in_pieces(engine, prompts):
    for streamed, whole in zip(together(engine, prompts, streams=True), together(engine, prompts), strict=True):
        assert streamed.events[-1] == whole.events[-1] and len(whole.events) == 1
        texts = [event.text for event in streamed.events if isinstance(event, Growing)]
        assert len(texts) == streamed.answer.answer_tokens - 1
        assert all(later.startswith(text) for text, later in pairwise([*texts, whole.answer.text]))


def test_who_has_left_gets_nothing_and_disturbs_nobody(engine, prompts):
    alone = [facts(together(engine, [prompt])[0]) for prompt in prompts]
    listeners = [Listener(prompt, streams=True) for prompt in prompts]
    listeners[2].left = listeners[3].left = True
    engine.answer(listeners)
    assert listeners[2].events == listeners[3].events == []
    assert [facts(one) for one in listeners if not one.left] == [alone[place] for place in (0, 1, 4, 5)]


def test_a_short_answer_does_not_wait_for_the_long_one_beside_it(engine, prompts):
    short, long = (Listener(replace(prompts[2], answer_tokens=number), streams=True) for number in (1, 12))
    order: list[Listener] = []
    for one in (short, long):
        one.put = lambda event, one=one: (one.events.append(event), order.append(one))  # type: ignore[method-assign]
    engine.answer([long, short])
    assert [listener.answer.answer_tokens for listener in (short, long)] == [1, 12]
    assert order.index(short) == 1 and len(order) == 13


def test_a_batch_ends_when_everybody_has_left(engine, prompts, monkeypatch):
    steps: list[bool] = []
    read = serve_engine._Decoding._read

    def leaving(self, row, token):
        steps.append(True)
        self._asks[row].left = len(steps) > 1
        return read(self, row, token)

    monkeypatch.setattr(serve_engine._Decoding, "_read", leaving)
    [listener] = together(engine, [replace(prompts[2], answer_tokens=12)], streams=True)
    assert len(steps) == 2 and len(listener.events) == 1


def test_where_nothing_is_located_only_the_run_is_offered(learned, monkeypatch):
    assert list(offered_models({"run": learned})) == ["run", "run:colours", "run:sides", "run:base"]
    monkeypatch.setattr(Cmoe, "locates", False)
    assert {name: model.task for name, model in offered_models({"run": learned}).items()} == {"run": None}


def test_a_task_called_base_keeps_its_name(learned):
    models = offered_models({"run": replace(learned, names=("base", "sides"))})
    assert {name: model.task for name, model in models.items()} == {"run": None, "run:base": 0, "run:sides": 1}


@pytest.mark.parametrize(("at", "way"), [((0, 0), "pad"), ((1, 1), "crop"), ((-1, 0), "pad"), ((1, 0), None)])
def test_a_picture_is_squared_as_its_task_does_or_refused(at: tuple[int, int], way: str | None, learned, monkeypatch):
    """`at` are the tasks that the picture is located at padded and cropped; the first task pads, the second crops."""
    two = replace(learned, geometries=("pad", "crop"))
    engine, reader = Engine(two), PromptReader(offered_models({"run": two}), SMALL)
    body = {"model": "run", "messages": message("Which?", data_url(Image.new("RGB", (60, 24), "red"))), "max_tokens": 2}
    prompt = reader.prepare(json.dumps(body).encode()).prompt
    ways = list(prompt.ways.values())
    read: list[torch.Tensor] = []
    generate = engine._method.model.generate

    def located(method, batch):
        [place] = [
            place for place, row in enumerate(ways) if torch.equal(row["pixel_values"], batch["pixel_values"][:1])
        ]
        return [(at[place], 1.0)] * len(batch["input_ids"])

    def watched(**options):
        read.append(options["pixel_values"])
        return generate(**options)

    monkeypatch.setattr(serve_engine, "tasks_and_scores", located)
    monkeypatch.setattr(engine._method.model, "generate", watched)
    asked, mate = together(engine, [prompt, replace(prompt, ways={"pad": prompt.ways["pad"]})])
    assert mate.answer.answer_tokens == 2
    if way is None:
        [refused] = asked.events
        assert isinstance(refused, Refused) and "square the picture yourself" in refused.message
        assert len(read[0]) == 1
    else:
        assert torch.equal(read[0][0], prompt.ways[way]["pixel_values"][0]) and asked.answer.answer_tokens == 2
