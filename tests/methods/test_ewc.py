"""EWC: the information of a row, the sum over tasks, and the penalty."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from formulas import data_of, doubled, restored, samples_of
from tiny import NUM_TRAIN, Lesson
from torch import Tensor

from llava_cmoe.data.collator import ROW
from llava_cmoe.data.conversation import IGNORED
from llava_cmoe.experts.ledger import trained_parameters
from llava_cmoe.methods.ewc import Ewc

WEIGHT = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_B.default.weight"


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("ewc")


@pytest.fixture
def method(lesson: Lesson) -> Ewc:
    """With the first task learned."""
    method = restored(lesson, 1)
    assert isinstance(method, Ewc)
    return method


def information(method: Ewc, lesson: Lesson, rows: list[int]) -> Tensor:
    """Mean over rows of the squared gradient of log p(answer | prompt) by one weight, in float64."""
    model, data = deepcopy(method.model).double(), data_of(lesson, 0)
    weight, squares = dict(model.named_parameters())[WEIGHT], []
    for row in rows:
        batch = doubled(samples_of(lesson, data.samples, [row]))
        labels_T = batch.pop("labels")[0, 1:]
        batch.pop(ROW)
        log_TV = model(**batch).logits[0, :-1].log_softmax(dim=-1)
        answer_T = labels_T != IGNORED
        log_likelihood = log_TV[answer_T].gather(1, labels_T[answer_T].unsqueeze(1)).sum()
        (slope,) = torch.autograd.grad(log_likelihood, [weight])
        squares.append(slope.square())
    return torch.stack(squares).mean(dim=0)


def added(method: Ewc, lesson: Lesson) -> Any:
    """The loss term of a batch."""
    batch = samples_of(lesson, data_of(lesson, 1).samples, range(4))
    with method.training_context(batch) as extra:
        return extra(method.model(**{name: value for name, value in batch.items() if name != ROW}))


def test_the_information_is_the_mean_over_rows_of_the_squared_slope_of_the_answer(lesson: Lesson, method: Ewc):
    expected = information(method, lesson, list(range(NUM_TRAIN)))
    found = method.fisher(data_of(lesson, 0))[WEIGHT]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    assert expected.any()
    stored = lesson.run.registry.load(0)["importance"][WEIGHT]  # what the task that was just learned put on record
    assert torch.equal(stored, found)


def test_of_many_rows_as_many_as_the_setting_says_are_drawn(lesson: Lesson, method: Ewc):
    method.settings = method.settings.model_copy(update={"fisher_rows": 3})
    data = data_of(lesson, 0)
    drawn = torch.randperm(NUM_TRAIN, generator=torch.Generator().manual_seed(data.seed))[:3].tolist()
    found, expected = method.fisher(data)[WEIGHT], information(method, lesson, drawn)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6 * float(expected.max()))


def test_the_loss_adds_how_far_weights_that_mattered_have_moved(lesson: Lesson, method: Ewc):
    assert added(method, lesson) == 0  # nothing has moved
    importance = lesson.run.registry.load(0)["importance"]
    generator, expected = torch.Generator().manual_seed(0), 0.0
    for name, weight in trained_parameters(method.model).items():
        moved = 0.1 * torch.randn(weight.shape, generator=generator)
        weight.data += moved
        expected += float((importance[name].double() * moved.double().square()).sum())
    penalty = added(method, lesson)
    assert penalty.item() == pytest.approx(method.settings.weight * expected, rel=1e-3)
    assert method.settings.weight == 100 and expected > 0
    (slope,) = torch.autograd.grad(penalty, [trained_parameters(method.model)[WEIGHT]])
    assert slope.any()


def test_the_first_task_is_held_by_nothing(lesson: Lesson):
    method = restored(lesson, 0)
    assert isinstance(method, Ewc) and added(method, lesson) == 0


def test_what_mattered_to_every_task_is_one_sum_and_weights_are_held_where_the_last_one_left_them(
    lesson: Lesson, lesson_of: Callable[..., Lesson]
):
    first, second = (lesson.run.registry.load(index)["importance"] for index in (0, 1))
    found = lesson.run.method.fisher(data_of(lesson, 1))
    assert first.keys() == second.keys() == found.keys()
    assert all(torch.equal(second[name], first[name] + found[name]) for name in found)
    half = lesson_of("ewc", "method.decay=0.5").run.registry
    assert all(torch.equal(half.load(1)["importance"][name], 0.5 * first[name] + found[name]) for name in found)
    weights = trained_parameters(lesson.run.method.model)
    assert all(torch.equal(lesson.run.method.anchor[name], weights[name]) for name in weights)


def test_without_its_penalty_it_is_sequential_lora_and_with_it_weights_that_mattered_move_less(
    lesson_of: Callable[..., Lesson],
):
    plain, free, held = lesson_of("sequential_lora"), lesson_of("ewc", "method.weight=0"), lesson_of("ewc")
    first, *ends = (lesson.run.registry.load(stage)["adapter"] for lesson, stage in zip_ends(plain, free, held))
    of_plain, of_free, of_held = ends
    assert all(torch.equal(of_plain[name], of_free[name]) for name in of_plain)
    importance = held.run.registry.load(0)["importance"]

    def moved(end: dict[str, Tensor]) -> float:
        of = {name.replace(".weight", ".default.weight"): value for name, value in end.items()}
        start = {name.replace(".weight", ".default.weight"): value for name, value in first.items()}
        return sum(float((importance[name] * (of[name] - start[name]).square()).sum()) for name in importance)

    assert moved(of_held) < 0.8 * moved(of_free)


def zip_ends(plain: Lesson, free: Lesson, held: Lesson) -> list[tuple[Lesson, int]]:
    """The first task, which all learn alike, and the last of each."""
    return [(plain, 0), (plain, 1), (free, 1), (held, 1)]
