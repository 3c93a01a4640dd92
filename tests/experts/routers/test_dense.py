"""A dense router's gate is the softmax over all experts, by logits of plain float32, and learns as such."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.dense import DenseRouter
from llava_cmoe.experts.routers.per_task import TaskRouters

WIDTH = 12
PASS = ForwardPass(RoutePlan.single(0))


def routers(num_experts: int, seed: int) -> tuple[DenseRouter, TaskRouters]:
    """The same weight in a dense router, and in one that chooses all experts as its top k."""
    found = DenseRouter(WIDTH), TaskRouters(WIDTH, top_k=num_experts)
    for router in found:
        router.add_task(range(num_experts), torch.device("cpu"), torch.Generator().manual_seed(seed))
    return found


@given(num_experts=st.integers(1, 9), seed=st.integers(0, 99), scale=st.floats(0.01, 30))
def test_it_weighs_and_learns_as_a_router_that_chooses_all_experts(num_experts: int, seed: int, scale: float):
    h_BTD = scale * torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
    gates, gradients = [], []
    for router in routers(num_experts, seed):
        gate = router(h_BTD, PASS)
        gates.append(gate.gate_BTE)
        gradients += torch.autograd.grad(gate.gate_BTE.square().sum(), router.weight(0))
    torch.testing.assert_close(*gates, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gate_is_float32_whatever_is_computed_in(dtype: torch.dtype):
    dense, _ = routers(4, seed=0)
    h_BTD = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = dense(h_BTD, PASS).gate_BTE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dense(h_BTD, PASS).gate_BTE, plain) and plain.dtype == torch.float32
