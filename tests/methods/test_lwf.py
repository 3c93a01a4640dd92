"""LwF: the distance between the model before a task and now, over the answers alone."""

from collections.abc import Callable

import pytest
import torch
from formulas import data_of, restored, samples_of
from tiny import Lesson
from torch import Tensor

from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW
from llava_cmoe.data.conversation import IGNORED
from llava_cmoe.experts.ledger import trained_parameters
from llava_cmoe.methods.lwf import Lwf, distance
from llava_cmoe.methods.sequential_lora import SequentialLora


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("lwf")


@pytest.fixture
def method(lesson: Lesson) -> Lwf:
    """In the middle of the second task: its weights are no longer those it began with."""
    method = restored(lesson, 1)
    assert isinstance(method, Lwf)
    method.before_task(data_of(lesson, 1), fit=lambda *args, **kwargs: None)
    generator = torch.Generator().manual_seed(0)
    for weight in trained_parameters(method.model).values():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return method


@pytest.fixture
def batch(lesson: Lesson) -> dict[str, Tensor]:
    return samples_of(lesson, data_of(lesson, 1).samples, range(6))


@torch.no_grad()
def logits_of(method: SequentialLora, batch: Batch) -> Tensor:
    logits_BTV: Tensor = method.model(**{name: batch[name] for name in batch if name not in (ROW, "labels")}).logits
    return logits_BTV


def kl(before_NV: Tensor, now_NV: Tensor, temperature: float) -> Tensor:
    """T^2 times the mean over tokens of sum_v p (log p - log q), in float64."""
    p_NV = (before_NV.double() / temperature).softmax(dim=-1)
    q_NV = (now_NV.double() / temperature).softmax(dim=-1)
    return temperature**2 * (p_NV * (p_NV.log() - q_NV.log())).sum(dim=-1).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_distance_is_the_softened_divergence_per_token(temperature: float):
    before_NV, now_NV = 3 * torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    found = distance(before_NV, now_NV, temperature)
    torch.testing.assert_close(found.double(), kl(before_NV, now_NV, temperature), rtol=1e-5, atol=1e-7)
    assert float(distance(now_NV, now_NV, temperature)) == pytest.approx(0, abs=1e-6)
    assert distance(before_NV[:0], now_NV[:0], temperature) == 0


@torch.no_grad()
def test_the_loss_adds_the_distance_from_the_model_before_over_answer_tokens(
    lesson: Lesson, method: Lwf, batch: dict[str, Tensor]
):
    with method.training_context(batch) as extra_loss:
        added = extra_loss(method.model(**{name: value for name, value in batch.items() if name != ROW}))
    before_BTV, now_BTV = logits_of(restored(lesson, 1), batch), logits_of(method, batch)
    answers = [
        (row, place - 1)  # the token before predicts it
        for row, labels in enumerate(batch["labels"].tolist())
        for place, label in enumerate(labels)
        if label != IGNORED
    ]
    rows, places = zip(*answers, strict=True)
    assert len(set(rows)) == 6
    expected = kl(before_BTV[rows, places], now_BTV[rows, places], temperature=2.0)
    torch.testing.assert_close(added.double(), expected, rtol=1e-4, atol=1e-6)
    assert expected > 1e-3


def test_only_the_model_of_now_learns_from_the_distance(method: Lwf, batch: dict[str, Tensor]):
    before = {name: weight.detach().clone() for name, weight in trained_parameters(method.model).items()}
    with method.training_context(batch) as extra_loss:
        extra_loss(method.model(**{name: value for name, value in batch.items() if name != ROW})).backward()
    weights = trained_parameters(method.model)
    assert all(weight.grad is not None and weight.grad.any() for weight in weights.values())
    assert all(torch.equal(weights[name], before[name]) for name in before)  # the teacher's are out of it again


def test_at_the_start_of_a_task_there_is_no_distance_yet(lesson: Lesson, batch: dict[str, Tensor]):
    method = restored(lesson, 1)
    assert isinstance(method, Lwf)
    method.before_task(data_of(lesson, 1), fit=lambda *args, **kwargs: None)
    with method.training_context(batch) as extra_loss:
        added = extra_loss(method.model(**{name: value for name, value in batch.items() if name != ROW}))
    assert added.item() == pytest.approx(0, abs=1e-6)


def test_the_first_task_has_no_teacher(lesson: Lesson, batch: dict[str, Tensor]):
    method = restored(lesson, 0)
    assert isinstance(method, Lwf)
    method.before_task(data_of(lesson, 0), fit=lambda *args, **kwargs: None)
    with method.training_context(batch) as extra_loss:
        assert extra_loss(method.model(**{name: value for name, value in batch.items() if name != ROW})) == 0


def test_without_its_weight_it_is_sequential_lora_and_with_it_answers_stay_closer(
    lesson: Lesson, lesson_of: Callable[..., Lesson], batch: dict[str, Tensor]
):
    plain, free, held = lesson_of("sequential_lora"), *(lesson_of("lwf", f"method.weight={w}") for w in (0, 1000))
    adapters = [other.run.registry.load(1)["adapter"] for other in (plain, free)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    answer_BT = batch["labels"][:, 1:] != IGNORED
    before_NV = logits_of(restored(lesson, 1), batch)[:, :-1][answer_BT]
    moved = [
        kl(before_NV, logits_of(other.run.method, batch)[:, :-1][answer_BT], temperature=2.0) for other in (held, free)
    ]
    assert moved[0] < 0.9 * moved[1]
