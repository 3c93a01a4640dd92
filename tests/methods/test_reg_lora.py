"""RegLoRA: what counts as a key element, and the penalty on it."""

from collections.abc import Callable

import pytest
import torch
from formulas import data_of, experts_of, restored, samples_of
from hypothesis import given
from hypothesis import strategies as st
from tiny import Lesson
from torch import Tensor

from llava_cmoe.data.collator import ROW
from llava_cmoe.experts.stack import LoraPair
from llava_cmoe.methods.reg_lora import RegLora, key_elements


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("reg_lora")


@pytest.fixture
def method(lesson: Lesson) -> RegLora:
    """With both tasks learned, and a third one about to be."""
    method = restored(lesson, 2)
    assert isinstance(method, RegLora)
    data = data_of(lesson, 0)
    method.before_task(type(data)(**{**vars(data), "index": 2, "seed": 5}), fit=lambda *args, **kwargs: None)
    for bank in method.host.banks.values():
        bank.stacks["linear"].trainable.B.data.normal_(generator=torch.Generator().manual_seed(0))
    return method


def on_keys(method: RegLora, tasks: int) -> Tensor:
    """Mean over linears of the newest product's mean size where the earlier ones are largest."""
    means = []
    for bank in method.host.banks.values():
        *earlier, newest = [b_OR @ a_RI for a_RI, b_OR in experts_of(bank).values()]
        num = max(1, round(0.02 * newest.numel()))
        keys = torch.cat([product.abs().flatten().topk(num).indices for product in earlier[:tasks]])
        means.append(newest.flatten()[keys].abs().mean())
    return torch.stack(means).mean()


def extra_loss(lesson: Lesson, method: RegLora) -> Tensor | float:
    batch = samples_of(lesson, data_of(lesson, 1).samples, range(4))
    with method.training_context(batch) as extra:
        output = method.model(**{name: value for name, value in batch.items() if name != ROW})
    return extra(output)


def test_the_loss_adds_the_new_products_size_at_the_key_elements_of_all_earlier_tasks(lesson: Lesson, method: RegLora):
    added = extra_loss(lesson, method)
    torch.testing.assert_close(added.double(), 2500 * on_keys(method, tasks=2), rtol=1e-5, atol=0)
    assert on_keys(method, tasks=2) != on_keys(method, tasks=1)
    added.backward()
    stacks = [bank.stacks["linear"] for bank in method.host.banks.values()]
    assert all(stack.trainable.A.grad.any() and stack.trainable.B.grad.any() for stack in stacks)
    assert all(stack.frozen.A.grad is None for stack in stacks)


def test_the_first_task_has_no_key_elements_to_keep_off(lesson: Lesson):
    method = restored(lesson, 0)
    assert isinstance(method, RegLora)
    method.before_task(data_of(lesson, 0), fit=lambda *args, **kwargs: None)
    assert extra_loss(lesson, method) == 0


def test_training_with_the_penalty_ends_smaller_there(lesson: Lesson, lesson_of: Callable[..., Lesson]):
    free = lesson_of("reg_lora", "method.key_weight=0")
    held, left_alone = (on_keys(other.run.method, tasks=1) for other in (lesson, free))
    assert held < 0.9 * left_alone


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 1), st.integers(0, 99))
def test_no_entry_that_is_left_out_is_larger_than_one_that_is_key(
    rank: int, d_in: int, d_out: int, share: float, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, rank, d_in), (1, d_out, rank)
    pair = LoraPair(*(torch.randn(shape, generator=generator) for shape in shapes))
    keys = key_elements(pair, share).tolist()
    size_F = (pair.b_EOR[0] @ pair.a_ERI[0]).abs().flatten()
    others = set(range(len(size_F))) - set(keys)
    assert len(set(keys)) == len(keys) == max(1, round(share * len(size_F)))
    assert not others or size_F[list(others)].max() <= size_F[keys].min()
