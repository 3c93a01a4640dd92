"""Grouped products compute what computing every expert does, for any choice of experts, and keep their promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from llava_cmoe.experts import grouped
from llava_cmoe.experts.grouped import grouped_sum, pays
from llava_cmoe.experts.stack import LoraPair, StackedExperts

D_IN, D_OUT, RANK = 8, 16, 8


def drawn(
    num_experts: int, num_slots: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, A, B, and the experts and shares of each token; some slots are of experts that are not there."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 5, D_IN), (num_experts, RANK, D_IN), (num_experts, RANK, D_OUT)
    x_BTI, a_ERI, b_ERO = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    place_BTC = torch.rand(2, 5, num_experts + 3, generator=generator).topk(num_slots).indices - 1
    share_BTC = torch.rand(2, 5, num_slots, generator=generator).requires_grad_()
    return x_BTI, a_ERI, b_ERO, place_BTC, share_BTC


@given(num_experts=st.integers(1, 9), num_slots=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_sum_and_all_gradients_are_those_of_a_loop_over_slots(num_experts: int, num_slots: int, seed: int):
    x_BTI, a_ERI, b_ERO, place_BTC, share_BTC = given_ = drawn(num_experts, num_slots, seed)
    expected_BTO = torch.zeros(2, 5, D_OUT)
    for row, token, slot in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(num_slots)).tolist():
        expert = int(place_BTC[row, token, slot])
        if 0 <= expert < num_experts:
            added_O = share_BTC[row, token, slot] * (x_BTI[row, token] @ a_ERI[expert].T) @ b_ERO[expert]
            where = torch.zeros(2, 5, 1)
            where[row, token] = 1
            expected_BTO = expected_BTO + where * added_O
    found_BTO = grouped_sum(*given_)
    torch.testing.assert_close(found_BTO, expected_BTO, rtol=1e-4, atol=1e-5)
    weights_BTO = torch.randn(2, 5, D_OUT, generator=torch.Generator().manual_seed(seed))
    learned = [x_BTI, a_ERI, b_ERO, share_BTC]
    found, wanted = (
        torch.autograd.grad((one * weights_BTO).sum(), learned, allow_unused=True, materialize_grads=True)
        for one in (found_BTO, expected_BTO + 0 * sum(one.sum() for one in learned))
    )
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_stack_adds_the_same_either_way(
    frozen: bool, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(0)
    stack = StackedExperts(D_IN, D_OUT)
    for ids in ((0, 3, 4, 8), (1, 2, 6, 11)):
        if frozen:
            stack.freeze()
        pair = LoraPair(
            torch.randn(4, RANK, D_IN, generator=generator), torch.randn(4, D_OUT, RANK, generator=generator)
        )
        stack.add(ids, pair, like=torch.zeros(1))
    x_BTI = torch.randn(2, 5, D_IN, generator=generator).to(dtype).requires_grad_()
    top_BTC = torch.rand(2, 5, 8, generator=generator).topk(2).indices
    gate_BTE = torch.zeros(2, 5, 8).scatter(-1, top_BTC, torch.rand(2, 5, 2, generator=generator))
    found = []
    for limit in (0, 10**9):
        monkeypatch.setitem(grouped.RANK_PER_SLOT, "cpu", limit)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            delta_BTO = stack(x_BTI, gate_BTE, (0, 1, 2, 3, 4, 5, 8, 11), top_BTC)  # 5 is nobody, 6 is not asked
        gradients = torch.autograd.grad(delta_BTO.float().square().sum(), [x_BTI, stack.trainable.A, stack.trainable.B])
        found.append((delta_BTO, *gradients))
    assert found[0][0].dtype == found[1][0].dtype == (torch.bfloat16 if autocast else dtype)
    tolerance = 0.02 if autocast or dtype == torch.bfloat16 else 1e-5
    for left, right in zip(*found, strict=True):
        assert left.dtype == right.dtype and (left - right).float().norm() <= tolerance * right.float().norm()


def test_rows_that_are_not_aligned_and_devices_that_were_not_measured_take_the_other_way(
    monkeypatch: pytest.MonkeyPatch,
):
    x_BTI, a_ERI, b_ERO, *_ = drawn(30, 2, seed=0)
    monkeypatch.setitem(grouped.RANK_PER_SLOT, "cpu", 100)
    assert pays(x_BTI, 30, a_ERI, b_ERO, num_slots=2) and not pays(x_BTI, 30, a_ERI, b_ERO, num_slots=3)
    assert not pays(x_BTI, 2, a_ERI, b_ERO, num_slots=2)  # a gate over two of them
    assert not pays(x_BTI, 30, a_ERI[:, :7], b_ERO[:, :7], num_slots=2)
    monkeypatch.delitem(grouped.RANK_PER_SLOT, "cpu")
    assert not pays(x_BTI, 30, a_ERI, b_ERO, num_slots=1)


def test_it_never_waits_for_the_device():
    parts = drawn(4, 2, seed=0, dtype=torch.bfloat16)  # all that shapes are known of without values
    with FakeTensorMode() as fake:  # has no values: reading one raises
        assert grouped_sum(*map(fake.from_tensor, parts)).shape == (2, 5, D_OUT)
