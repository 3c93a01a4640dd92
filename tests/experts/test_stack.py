"""Stacked experts are a loop over experts by id, whichever of them are frozen, trainable or gone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from banks import CountOps
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llava_cmoe.experts.stack import ExpertBlock, LoraPair, StackedExperts

RANK, D_IN, D_OUT, WIDTH = 2, 5, 7, 12
"""Width of the gates: ids go beyond it."""

ids = st.lists(st.integers(0, WIDTH + 3), max_size=8, unique=True)


def drawn(num: int, generator: torch.Generator) -> LoraPair:
    shapes = (num, RANK, D_IN), (num, D_OUT, RANK)
    return LoraPair(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


@dataclass
class Both:
    """A stack in float64, and the same experts as a dictionary from id to A and B."""

    generator: torch.Generator
    stack: StackedExperts = field(default_factory=lambda: StackedExperts(D_IN, D_OUT))
    experts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, some: list[int]) -> None:
        pair = drawn(len(some), self.generator)
        self.stack.add(some, pair, like=torch.zeros(1, dtype=torch.float64))
        self.experts |= {expert: (pair.a_ERI[place], pair.b_EOR[place]) for place, expert in enumerate(some)}

    def loop(self, x_BTI: Tensor, gate_BTE: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        total_BTO = torch.zeros(*x_BTI.shape[:2], D_OUT, dtype=torch.float64)
        for column, expert in enumerate(range(gate_BTE.shape[-1]) if ids is None else ids):
            if expert in self.experts:
                a_RI, b_OR = self.experts[expert]
                total_BTO += gate_BTE[..., column, None] * (x_BTI @ a_RI.T @ b_OR.T)
        return total_BTO


def mixture(stack: StackedExperts, x_BTI: Tensor, gate_BTE: Tensor, ids: Sequence[int] | None = None) -> Tensor:
    delta_BTO = stack(x_BTI, gate_BTE, ids)
    return torch.zeros(*x_BTI.shape[:2], D_OUT, dtype=x_BTI.dtype) if delta_BTO is None else delta_BTO


def tokens(generator: torch.Generator, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """States of 2 x 3 tokens, and a gate of that width."""
    return tuple(torch.randn(2, 3, size, generator=generator, dtype=torch.float64) for size in (D_IN, width))


def built(data: st.DataObject) -> Both:
    """A stack of any ids, some of which were frozen and dropped in between."""
    both = Both(torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed")))
    for some in data.draw(st.lists(st.lists(st.integers(0, WIDTH + 3), min_size=1, max_size=4), max_size=4)):
        if new := sorted({*some} - both.experts.keys()):
            both.add(new)
        if data.draw(st.booleans(), label="freeze"):
            both.stack.freeze(data.draw(st.none() | ids, label="frozen"))
        gone = data.draw(ids, label="dropped")
        both.stack.drop(gone)
        both.experts = {expert: pair for expert, pair in both.experts.items() if expert not in gone}
    return both


@given(data=st.data())
def test_any_set_of_ids_computes_what_a_loop_over_experts_does(data: st.DataObject):
    both = built(data)
    held = sorted(expert for block in both.stack.blocks for expert in block.ids)
    assert held == sorted(both.experts)
    assert all(block.ids == tuple(sorted(block.ids)) and len(block.A) == len(block.ids) for block in both.stack.blocks)
    x_BTI, gate_BTE = tokens(both.generator)
    found = mixture(both.stack, x_BTI, gate_BTE)
    torch.testing.assert_close(found, both.loop(x_BTI, gate_BTE), rtol=1e-12, atol=1e-12)


named = st.lists(st.integers(0, WIDTH + 5), min_size=1, max_size=6, unique=True).map(lambda some: tuple(sorted(some)))


@given(data=st.data(), gates=st.lists(named, min_size=1, max_size=3))
def test_a_gate_over_some_experts_is_the_whole_gate_with_zeros_elsewhere(
    data: st.DataObject, gates: list[tuple[int, ...]]
):
    both = built(data)
    for some in (*gates, gates[0]):  # one gate after another: what was worked out for one is not the next one's
        x_BTI, gate_BTE = tokens(both.generator, len(some))
        whole_BTE = torch.zeros(2, 3, WIDTH + 16, dtype=torch.float64)
        whole_BTE[..., list(some)] = gate_BTE
        of_some = mixture(both.stack, x_BTI, gate_BTE, some)
        torch.testing.assert_close(of_some, mixture(both.stack, x_BTI, whole_BTE), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_some, both.loop(x_BTI, gate_BTE, some), rtol=1e-12, atol=1e-12)
        nothing = both.experts.keys().isdisjoint(some)
        assert (both.stack(x_BTI, gate_BTE, some) is None) == nothing  # nothing is computed for nobody


@given(seed=st.integers(0, 99), some=named, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_copies_of_the_frozen_experts_that_a_gate_names_are_made_once_and_are_theirs(
    seed: int, some: tuple[int, ...], dtype: torch.dtype
):
    generator = torch.Generator().manual_seed(seed)
    stack, pair = StackedExperts(D_IN, D_OUT), drawn(WIDTH + 6, generator)
    stack.add(range(WIDTH + 6), pair, like=torch.zeros(1))
    stack.freeze()
    x_BTI, gate_BTE = (one.to(dtype) for one in tokens(generator, len(some)))
    alone = StackedExperts(D_IN, D_OUT)
    alone.add(some, LoraPair(pair.a_ERI[list(some)], pair.b_EOR[list(some)]), like=torch.zeros(1))
    alone.freeze()
    expected = mixture(alone, x_BTI, gate_BTE, some)
    assert torch.equal(mixture(stack, x_BTI, gate_BTE, some), expected)
    with CountOps() as again:
        assert torch.equal(mixture(stack, x_BTI, gate_BTE, some), expected)
    assert not any("index" in op for op in again.ops) or some[-1] - some[0] + 1 == len(some)


@given(data=st.data(), gone=ids)
def test_an_expert_keeps_its_id_and_what_it_adds_when_others_are_dropped(data: st.DataObject, gone: list[int]):
    both = built(data)
    x_BTI, gate_BTE = tokens(both.generator)
    kept = [expert for expert in both.experts if expert not in gone]
    before = {expert: mixture(both.stack, x_BTI, gate_BTE[..., expert : expert + 1], (expert,)) for expert in kept}
    were_trainable = set() if both.stack.trainable is None else {*both.stack.trainable.ids}
    both.stack.drop(iter(gone))
    for expert, delta_BTO in before.items():
        after = mixture(both.stack, x_BTI, gate_BTE[..., expert : expert + 1], (expert,))
        assert torch.equal(after, delta_BTO) and (expert >= WIDTH or after.any())
    assert ({*both.stack.trainable.ids} if both.stack.trainable else set()) == were_trainable - {*gone}
    for block in both.stack.blocks:
        assert block.A.requires_grad == block.B.requires_grad == (block is both.stack.trainable)
    for expert in gone:  # its column of the gate adds nothing
        assert both.stack(x_BTI, gate_BTE[..., :1], (expert,)) is None


@given(data=st.data(), chosen=ids)
def test_freezing_some_moves_only_those_and_changes_no_output(data: st.DataObject, chosen: list[int]):
    both = built(data)
    frozen, trainable = ({*block.ids} if block else set() for block in (both.stack.frozen, both.stack.trainable))
    x_BTI, gate_BTE = tokens(both.generator)
    before = mixture(both.stack, x_BTI, gate_BTE)
    both.stack.freeze(iter(chosen))
    after = [{*block.ids} if block else set() for block in (both.stack.frozen, both.stack.trainable)]
    assert after == [frozen | (trainable & {*chosen}), trainable - {*chosen}]
    torch.testing.assert_close(mixture(both.stack, x_BTI, gate_BTE), before, rtol=1e-12, atol=1e-12)
    assert not any(block.A.requires_grad for block in [both.stack.frozen] if block)
    both.stack.freeze()
    assert both.stack.trainable is None
    torch.testing.assert_close(mixture(both.stack, x_BTI, gate_BTE), before, rtol=1e-12, atol=1e-12)


def test_only_trainable_experts_that_are_columns_of_the_gate_get_a_gradient():
    both = Both(torch.Generator().manual_seed(0))
    both.add([0, 4])
    both.stack.freeze([4])
    both.add([2, 9])
    x_BTI, gate_BTE = tokens(both.generator, 5)
    both.stack(x_BTI, gate_BTE).square().sum().backward()
    block = both.stack.trainable
    assert block.ids == (0, 2, 9) and both.stack.frozen.A.grad is None
    for matrix in (block.A, block.B):
        assert matrix.grad.flatten(1).any(dim=1).tolist() == [True, True, False]


@given(data=st.data())
def test_what_is_read_is_a_copy_in_the_order_asked_for(data: st.DataObject):
    both = built(data)
    if not both.experts:
        return
    wanted = data.draw(st.lists(st.sampled_from(sorted(both.experts)), min_size=1, max_size=5))
    pair = both.stack.read(iter(wanted))
    assert torch.equal(pair.a_ERI, torch.stack([both.experts[expert][0] for expert in wanted]))
    assert torch.equal(pair.b_EOR, torch.stack([both.experts[expert][1] for expert in wanted]))
    pair.a_ERI.zero_(), pair.b_EOR.zero_()
    assert all(block.A.flatten(1).any(dim=1).all() for block in both.stack.blocks)


def test_a_block_that_loses_nothing_is_the_very_block():
    both = Both(torch.Generator())
    both.add([3, 5])
    block = both.stack.trainable
    both.stack.drop([4])
    assert both.stack.trainable is block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_take_the_dtype_they_are_asked_to_be_like(dtype: torch.dtype):
    stack = StackedExperts(D_IN, D_OUT)
    stack.add([0], drawn(1, torch.Generator()), like=torch.zeros(1, dtype=dtype))
    assert isinstance(stack.trainable, ExpertBlock) and stack.trainable.A.dtype == stack.trainable.B.dtype == dtype


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [torch.float32, torch.bfloat16])
def test_experts_compute_in_the_dtype_of_the_activations_and_frozen_ones_are_cast_once(
    active: torch.dtype, held: torch.dtype, frozen: bool
):
    pair, (x_BTI, gate_BTE) = drawn(3, torch.Generator()), tokens(torch.Generator(), 3)
    stack, like_x = (StackedExperts(D_IN, D_OUT) for _ in range(2))
    stack.add(range(3), pair, like=torch.zeros(1, dtype=held))
    like_x.add(range(3), stack.read(range(3)), like=torch.zeros(1, dtype=active))
    if frozen:
        stack.freeze()
        like_x.freeze()
    x_BTI = x_BTI.to(active)
    with torch.no_grad():
        assert torch.equal(stack(x_BTI, gate_BTE), like_x(x_BTI, gate_BTE))
        with CountOps() as again:
            stack(x_BTI, gate_BTE)
        with CountOps() as without_a_cast:
            like_x(x_BTI, gate_BTE)
        assert (again.ops == without_a_cast.ops) == (frozen or held == active)
    assert torch.equal(stack(x_BTI, gate_BTE), like_x(x_BTI, gate_BTE))  # with a graph


def test_experts_that_learn_are_cast_as_they_are_now():
    pair, (x_BTI, gate_BTE) = drawn(2, torch.Generator()), tokens(torch.Generator(), 2)
    stack = StackedExperts(D_IN, D_OUT)
    stack.add(range(2), pair, like=torch.zeros(1))
    with torch.no_grad():
        before = stack(x_BTI.bfloat16(), gate_BTE)
        stack.trainable.B.mul_(2)
        torch.testing.assert_close(stack(x_BTI.bfloat16(), gate_BTE), 2 * before)
