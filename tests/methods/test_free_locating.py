"""Locating inside the answering pass costs no pass of its own and says what locating before it says."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from tiny import Lesson
from torch import Tensor

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.chat import session as chat
from llava_cmoe.chat.session import open_session
from llava_cmoe.data.collator import Collator
from llava_cmoe.evaluation.generate import EvalModel, EvalSet, Route, answer_batch
from llava_cmoe.evaluation.log import Answer, read_answers
from llava_cmoe.locators.base import Locator
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.records import Located
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.base import RecipeError

ABOVE = "model.language_model.layers.1.mlp"
"""The only site of two layers that may hold experts here."""

FREE = (
    "method.experts.first_layer=1",
    "method.probe.scope=all",
    "method.locator.free=true",
    "evaluation.routes=[located]",
    "data.train_rows=12",
)
FEATURES = {
    "last": ("method.locator.layer=1",),
    "mean": ("method.locator.layer=0", "method.locator.feature=mean", "method.locator.selection=soft"),
}
LOCATED = Route("located", task_index=0, num_known=2, seed=0)
NUM_TOKENS = 3


@pytest.fixture(scope="module", params=FEATURES)
def lesson(
    request: pytest.FixtureRequest, tiny_data: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Lesson:
    run = tmp_path_factory.mktemp(request.param) / "run"
    return tiny.attend(tiny.recipe(run, tiny_data, tiny_backbone, "cmoe", *FREE, *FEATURES[request.param]))


@pytest.fixture(scope="module")
def free(lesson: Lesson) -> Cmoe:
    assert isinstance(lesson.run.method, Cmoe)
    return lesson.run.method


@pytest.fixture(scope="module")
def twice(lesson: Lesson) -> Cmoe:
    """The same run, located by a forward pass of its own."""
    method = lesson.recipe.method
    settings = method.model_copy(update={"locator": method.locator.model_copy(update={"free": False})})
    recipe = lesson.recipe.model_copy(update={"method": settings})
    restored = restore_method(recipe, load_backbone(recipe.backbone), Registry(recipe.run))
    assert isinstance(restored, Cmoe)
    return restored


@pytest.fixture(scope="module")
def questions(lesson: Lesson) -> EvalSet:
    """All evaluation questions of both tasks."""
    parts = list(lesson.questions.values())
    ids = tuple(sample_id for part in parts for sample_id in part.ids)
    texts = tuple(text for part in parts for text in part.texts)
    prompts = [part.prompts[index] for part in parts for index in range(len(part.ids))]
    return EvalSet(ids, texts, prompts, NUM_TOKENS)


def ask(method: Cmoe, questions: EvalSet, batch: Sequence[int]) -> list[Answer]:
    return answer_batch(EvalModel(method, method.model, method.processor), questions, batch, LOCATED)


def everything(questions: EvalSet) -> range:
    return range(len(questions.ids))


@contextmanager
def passes(method: Cmoe) -> Iterator[list[int]]:
    """Tokens per row of every call of the lowest LLM layer."""
    seen: list[int] = []

    def note(_: object, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[1])

    hook = method.model.get_decoder().layers[0].register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def prefill(method: Cmoe, batch: dict[str, Tensor]) -> tuple[Tensor, Located]:
    """Logits of the first new token (B, V), and the verdict that they were computed under."""
    with method.answering(batch) as location:
        out = method.model.generate(**batch, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
        located = location()
    assert located is not None
    return out.logits[0], located


def test_answers_and_located_tasks_are_those_of_two_passes(free: Cmoe, twice: Cmoe, questions: EvalSet):
    one, two = (ask(method, questions, everything(questions)) for method in (free, twice))
    assert [(a.text, a.located) for a in one] == [(a.text, a.located) for a in two]
    assert {answer.located for answer in one} >= {0, 1}  # a mixed batch
    for mine, other in zip(one, two, strict=True):
        assert mine.score == (None if other.score is None else pytest.approx(other.score, rel=1e-3, abs=1e-3))


def test_an_evaluation_that_locates_first_gives_the_answers_of_locating_in_passing(free: Cmoe, lesson: Lesson):
    for task, questions in lesson.questions.items():
        passing = ask(free, questions, everything(questions))
        stored = read_answers(lesson.recipe.run / f"answers/after_02/{task}.located.jsonl")
        assert [(a.text, a.located) for a in stored] == [(a.text, a.located) for a in passing]


def test_the_first_token_is_computed_on_the_located_route(free: Cmoe, twice: Cmoe, lesson: Lesson):
    batch = lesson.prompts()
    (one, located), (two, _) = prefill(free, batch), prefill(twice, batch)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    with free.answering(batch, torch.full((4,), -1)):
        base = free.model.generate(**batch, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    assert bool((located.task_B >= 0).any())
    assert ((one - base.logits[0]).abs().amax(dim=1) > 1e-4).tolist() == (located.task_B >= 0).tolist()


def test_a_prompt_is_read_once_and_decoding_is_as_ever(free: Cmoe, twice: Cmoe, questions: EvalSet):
    batch = everything(questions)
    longest = max(len(questions.prompts[index]["input_ids"]) for index in batch)
    with passes(free) as once, passes(twice) as two:
        ask(free, questions, batch)
        ask(twice, questions, batch)
    assert once[0] == longest and set(once[1:]) <= {1} and len(once) <= NUM_TOKENS
    assert two[0] > 1 and two[1:] == once  # with the feature's own pass before


def test_a_prompt_is_located_once_for_its_whole_answer(free: Cmoe, questions: EvalSet, monkeypatch):
    seen: list[int] = []
    locate = Locator.locate

    def counted(locator: Locator, feature_BD: Tensor) -> Located:
        seen.append(len(feature_BD))
        return locate(locator, feature_BD)

    monkeypatch.setattr(Locator, "locate", counted)
    ask(free, questions, everything(questions))
    assert seen == [len(questions.ids)]


def test_a_mixed_batch_equals_separate_batches(free: Cmoe, questions: EvalSet):
    together = ask(free, questions, everything(questions))
    alone = [answer for index in everything(questions) for answer in ask(free, questions, [index])]
    assert [(a.text, a.located) for a in together] == [(a.text, a.located) for a in alone]


@pytest.mark.parametrize("width", [0, 1, 9])
def test_padding_on_the_left_moves_no_verdict(free: Cmoe, lesson: Lesson, questions: EvalSet, width: int):
    pad = lesson.run.backbone.processor.tokenizer.pad_token_id
    batch = Collator(pad, "left")(questions.prompts)
    fill = {"input_ids": pad, "attention_mask": 0}
    padded = {
        name: torch.nn.functional.pad(tensor, (width, 0), value=fill[name]) if name in fill else tensor
        for name, tensor in batch.items()
    }
    before = free.locating.locate(batch)  # pads on the right, whatever it is given
    _, within = prefill(free, padded)
    assert torch.equal(within.task_B, before.task_B)
    torch.testing.assert_close(within.score_BN, before.score_BN, rtol=1e-3, atol=1e-3)


def test_a_pass_that_pads_on_the_right_is_located_at_its_last_real_tokens(free: Cmoe, lesson: Lesson):
    rows = [question.prompts[index] for question in lesson.questions.values() for index in (0, 3)]
    batch = Collator(lesson.run.backbone.processor.tokenizer.pad_token_id, "right")(rows)
    assert not batch["attention_mask"].all()
    with torch.no_grad(), free.answering(batch) as location:
        free.model(**batch)
    assert torch.equal(location().task_B, free.locating.locate(batch).task_B)
    torch.testing.assert_close(location().score_BN, free.locating.locate(batch).score_BN, rtol=1e-3, atol=1e-3)


def test_nothing_is_left_behind_after_an_answer_or_an_error(free: Cmoe, lesson: Lesson):
    batch = lesson.prompts()
    layers = free.model.get_decoder().layers
    prefill(free, batch)
    with pytest.raises(ValueError, match="nothing is located yet"), free.answering(batch) as location:
        location()
    assert not any(layer._forward_pre_hooks for layer in layers)
    with torch.no_grad():
        assert torch.equal(free.model(**batch).logits, lesson.base)


def test_other_prompts_than_those_to_locate_are_refused(free: Cmoe, lesson: Lesson):
    batch = lesson.prompts()
    half = {name: tensor[:2] for name, tensor in batch.items()}
    with pytest.raises(ValueError, match="were to be located"), torch.no_grad(), free.answering(half):
        free.model(**batch)


def test_confusion_is_counted_as_ever(lesson: Lesson):
    assert lesson.results.locator is not None
    assert [sum(row) for row in lesson.results.locator.confusion] == [tiny.NUM_EVAL] * 2


def test_experts_below_the_first_layer_do_not_exist(free: Cmoe, lesson: Lesson):
    assert list(free.host.banks) == [ABOVE] == list(lesson.results.sites)
    assert lesson.results.growth == {task: {ABOVE: count} for task, count in zip(tiny.TASKS, (2, 1), strict=True)}
    for record in Registry(lesson.recipe.run).records():
        stored = Registry(lesson.recipe.run).load(record.index)
        names = {name.split("/")[0] for group in ("experts", "routers") for name in stored[group]}
        assert names == {ABOVE}


def test_an_old_task_computes_the_same_bits_after_the_model_grew(lesson: Lesson):
    before, after = (logits[0] for logits in lesson.logits)
    assert torch.equal(before, after) and not torch.equal(after, lesson.logits[1][1])


def test_chat_locates_and_answers_as_the_evaluation_does(free: Cmoe, lesson: Lesson, questions: EvalSet, monkeypatch):
    monkeypatch.setattr(chat, "LONGEST_ANSWER", NUM_TOKENS)
    talk = open_session(lesson.recipe.run)
    row = lesson.run.eval_spec.rows["sides"][1]
    [wanted] = ask(free, questions, [tiny.NUM_EVAL + 1])
    with passes(talk._method) as seen:
        reply = talk.ask(Path(row["image"]), row["turns"][0]["text"].removeprefix("<image>\n"))
        assert "".join(reply.pieces).strip() == wanted.text
    assert reply.verdict.task == (None if wanted.located == -1 else tiny.TASKS[wanted.located])
    assert seen[0] > 1 and set(seen[1:]) <= {1}


# What is refused.


@pytest.fixture
def refused(tiny_data: Path, tiny_backbone: Path, tmp_path: Path) -> Callable[..., str]:
    def attempt(*overrides: str) -> str:
        with pytest.raises(RecipeError) as error:
            recipe = tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "cmoe", *overrides)
            backbone = load_backbone(recipe.backbone)
            Cmoe(recipe.method, backbone.model, backbone.processor, seed=0)
        return str(error.value)

    return attempt


@pytest.mark.parametrize(("layer", "first"), [(2, 1), (1, 0), (-1, 1), (-2, 1)])
def test_a_layer_that_experts_may_have_touched_is_refused_by_name(refused: Callable[..., str], layer: int, first: int):
    told = refused(f"method.experts.first_layer={first}", f"method.locator.layer={layer}", "method.locator.free=true")
    assert f"locator.layer is {layer}" in told and f"experts.first_layer is {first}" in told


def test_a_first_layer_that_the_model_does_not_have_is_refused_by_name(refused: Callable[..., str]):
    told = refused("method.experts.first_layer=2")
    assert told.startswith("method.experts.first_layer is 2, but this model's LLM layers are 0 to 1")
