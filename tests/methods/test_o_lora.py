"""O-LoRA: the sum of all adapters, and the penalty that keeps the newest orthogonal to the others."""

from collections.abc import Callable

import pytest
import torch
from formulas import data_of, experts_of, restored, samples_of, through
from tiny import Lesson
from torch import Tensor

from llava_cmoe.data.collator import ROW
from llava_cmoe.methods.base import Method
from llava_cmoe.methods.o_lora import OLora

SITE = "model.language_model.layers.1.self_attn.v_proj"


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("o_lora")


@pytest.fixture
def method(lesson: Lesson) -> OLora:
    """With the first task learned, and the second one about to be."""
    method = restored(lesson, 1)
    assert isinstance(method, OLora)
    method.before_task(data_of(lesson, 1), fit=lambda *args, **kwargs: None)
    return method


def penalty(method: OLora) -> Tensor:
    """Sum over linears and earlier tasks of |A_t A_i^T|, entry by entry, as the docstring has it."""
    total = torch.zeros((), dtype=torch.float64)
    for bank in method.host.banks.values():
        *earlier, newest = [a_RI for a_RI, _ in experts_of(bank).values()]
        total += sum((newest @ a_RI.T).abs().sum() for a_RI in earlier)
    return total


@torch.no_grad()
def test_a_linear_adds_up_all_adapters(lesson: Lesson):
    method, batch = lesson.run.method, lesson.prompts()
    bank = method.host.banks[SITE]
    with through(bank) as calls, method.answering(batch):
        method.model(**batch)
    ((x_BTI, y_BTO),) = calls
    expected_BTO = x_BTI @ bank.frozen.frozen.weight.double().T
    pairs = experts_of(bank)
    assert len(pairs) == 2
    for a_RI, b_OR in pairs.values():
        expected_BTO = expected_BTO + 8 / 4 * x_BTI @ a_RI.T @ b_OR.T
    torch.testing.assert_close(y_BTO, expected_BTO, rtol=0, atol=1e-5)
    assert all(b_OR.any() for _, b_OR in pairs.values())  # none of them is there for nothing


def test_the_loss_adds_half_of_what_the_new_adapter_shares_with_the_others(lesson: Lesson, method: OLora):
    added = extra_loss(lesson, method)
    torch.testing.assert_close(added.double(), 0.5 * penalty(method), rtol=1e-6, atol=0)
    added.backward()
    stacks = [bank.stacks["linear"] for bank in method.host.banks.values()]
    assert all(stack.trainable.A.grad.any() and stack.trainable.B.grad is None for stack in stacks)
    assert all(stack.frozen.A.grad is None for stack in stacks)


def test_a_third_task_is_held_apart_from_both_others(lesson: Lesson, method: OLora):
    of_two = penalty(method)
    method.host.freeze()
    method.before_task(data_of(lesson, 0), fit=lambda *args, **kwargs: None)  # of another seed
    assert len(method.host.banks[SITE].ids) == 3
    torch.testing.assert_close(extra_loss(lesson, method).double(), 0.5 * penalty(method), rtol=1e-6, atol=0)
    assert penalty(method) > 1.5 * of_two


def test_the_first_task_has_nothing_to_keep_apart_from(lesson: Lesson):
    method = restored(lesson, 0)
    assert isinstance(method, OLora)
    method.before_task(data_of(lesson, 0), fit=lambda *args, **kwargs: None)
    assert extra_loss(lesson, method) == 0


def test_training_with_the_penalty_ends_closer_to_orthogonal(lesson: Lesson, lesson_of: Callable[..., Lesson]):
    free = lesson_of("o_lora", "method.orthogonal_weight=0")
    held_apart, left_alone = (penalty(other.run.method) for other in (lesson, free))
    assert held_apart < 0.9 * left_alone


def extra_loss(lesson: Lesson, method: Method) -> Tensor:
    batch = samples_of(lesson, data_of(lesson, 1).samples, range(4))
    with method.training_context(batch) as extra:
        output = method.model(**{name: value for name, value in batch.items() if name != ROW})
    return extra(output)
