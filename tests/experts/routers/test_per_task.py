import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers import Routers

D = 24


def make_routers(widths: list[int], top_k: int = 2, seed: int = 0) -> Routers:
    generator = torch.Generator().manual_seed(seed)
    routers = Routers(D, top_k)
    for width in widths:
        routers.grow(width, torch.device("cpu"), generator)
    return routers


def states(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(seed))


def gate(routers: Routers, h_BTD: Tensor, plan: RoutePlan) -> Tensor:
    gate_BTE: Tensor = routers(h_BTD, plan).gate_BTE
    return gate_BTE


growing = st.lists(st.integers(0, 3), min_size=2, max_size=5).map(
    lambda steps: [1 + sum(steps[: i + 1]) for i in range(len(steps))]
)


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 9), top_k=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_gate_is_the_softmax_cut_to_its_top_k_and_renormalised(width: int, top_k: int, seed: int) -> None:
    routers, h_BTD = make_routers([width], top_k, seed), states(2, 5, seed)
    gate_BTE = gate(routers, h_BTD, RoutePlan.single(0))
    probability_BTE = torch.softmax(h_BTD @ routers.task_0.T, dim=-1)
    top, index = probability_BTE.topk(min(top_k, width))
    reference = torch.zeros_like(probability_BTE).scatter(-1, index, top / top.sum(-1, keepdim=True))
    torch.testing.assert_close(gate_BTE, reference)
    torch.testing.assert_close(gate_BTE.sum(-1), torch.ones(2, 5))


@settings(max_examples=25, deadline=None)
@given(widths=growing, top_k=st.integers(1, 4), seed=st.integers(0, 99))
def test_an_old_tasks_gate_keeps_its_bits_when_routers_are_added(widths: list[int], top_k: int, seed: int) -> None:
    routers, h_BTD = make_routers(widths[:-1], top_k, seed), states(3, 7, seed)
    newest = len(widths) - 2
    plans = [RoutePlan.single(newest), RoutePlan.hard(torch.tensor([0, newest, -1]))]
    before = [gate(routers, h_BTD, plan) for plan in plans]
    routers.freeze()
    routers.grow(widths[-1], torch.device("cpu"), torch.Generator().manual_seed(seed))
    assert all(torch.equal(gate(routers, h_BTD, plan), old) for plan, old in zip(plans, before, strict=True))


@settings(max_examples=25, deadline=None)
@given(widths=growing, top_k=st.integers(1, 4), tokens=st.sampled_from([1, 2, 7, 33]), data=st.data())
def test_a_samples_gate_does_not_depend_on_its_batch_mates(
    widths: list[int], top_k: int, tokens: int, data: st.DataObject
) -> None:
    tasks = data.draw(st.lists(st.integers(-1, len(widths) - 1), min_size=1, max_size=6).filter(lambda t: max(t) >= 0))
    routers, h_BTD = make_routers(widths, top_k), states(len(tasks), tokens)
    mixed_BTE = gate(routers, h_BTD, RoutePlan.hard(torch.tensor(tasks)))
    for row, task in enumerate(tasks):
        known = widths[task] if task >= 0 else 0
        assert not mixed_BTE[row, :, known:].any()
        if task >= 0:
            alone = gate(routers, h_BTD[row : row + 1], RoutePlan.single(task))[0]
            whole_batch = gate(routers, h_BTD, RoutePlan.single(task))[row]
            assert torch.equal(mixed_BTE[row, :, :known], alone) and torch.equal(whole_batch, alone)


def test_among_equal_logits_the_oldest_experts_win() -> None:
    routers = Routers(D, top_k=2)
    routers.add(torch.ones(40, D))
    gate_BTE = gate(routers, states(2, 50), RoutePlan.single(0))
    assert torch.equal(gate_BTE[..., :2], torch.full((2, 50, 2), 0.5)) and not gate_BTE[..., 2:].any()


def test_a_soft_plan_mixes_the_gates_of_its_tasks_by_weight() -> None:
    routers, h_BTD = make_routers([2, 4]), states(2, 3)
    old = torch.nn.functional.pad(gate(routers, h_BTD, RoutePlan.single(0)), (0, 2))
    new = gate(routers, h_BTD, RoutePlan.single(1))
    for rows in (1, 2):
        plan = RoutePlan(torch.tensor([[1, 0]]).expand(rows, 2), torch.tensor([[0.75, 0.25]]).expand(rows, 2), newest=1)
        torch.testing.assert_close(gate(routers, h_BTD, plan), 0.75 * new + 0.25 * old)


def test_rows_that_know_no_expert_have_a_zero_gate_and_finite_gradients() -> None:
    routers = make_routers([0, 3])  # the site had no experts when task 0 was learned
    h_BTD = states(3, 4).requires_grad_()
    plan = RoutePlan.hard(torch.tensor([0, -1, 1]))
    gate_BTE = gate(routers, h_BTD, plan)
    assert not gate_BTE[:2].any() and gate_BTE[2].sum() > 0
    routers(h_BTD, plan).probability(None)[0].backward()
    assert h_BTD.grad is not None and h_BTD.grad.isfinite().all()
    assert not h_BTD.grad[:2].any() and routers.task_1.grad.any()


def test_counts_and_probabilities_leave_out_pads_unknown_experts_and_rows_without_experts() -> None:
    routers, h_BTD = make_routers([1, 3]), states(3, 4)
    mask_BT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    seen = routers(h_BTD, RoutePlan.hard(torch.tensor([0, -1, 1])))
    counts_E = seen.counts(mask_BT)
    chosen = gate(routers, h_BTD[2:, 2:], RoutePlan.single(1)).gt(0).sum((0, 1))
    assert counts_E.dtype == torch.int64
    assert counts_E.tolist() == (torch.tensor([3, 0, 0]) + chosen).tolist()  # task 0 has one expert: one slot a token
    expected = torch.softmax(h_BTD[2, 2:] @ routers.task_1.T, dim=-1).sum(0) + torch.tensor([3.0, 0, 0])
    torch.testing.assert_close(seen.probability(mask_BT), expected)
    assert counts_E.sum() < seen.counts(None).sum()


def test_autocast_and_half_precision_states_leave_the_gate_in_float32() -> None:
    routers, h_BTD = make_routers([6]), states(2, 9).bfloat16()
    expected = gate(routers, h_BTD.float(), RoutePlan.single(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate_BTE = gate(routers, h_BTD, RoutePlan.single(0))
    assert gate_BTE.dtype == torch.float32 and torch.equal(gate_BTE, expected)


def test_a_lead_is_on_top_of_the_rows_of_new_experts_alone() -> None:
    lead_D = torch.ones(D)
    led, plain = make_routers([2]), make_routers([2])
    led.grow(4, torch.device("cpu"), torch.Generator().manual_seed(5), lead_D)
    plain.grow(4, torch.device("cpu"), torch.Generator().manual_seed(5))
    assert torch.equal(led.task_1[:2], plain.task_1[:2])
    assert torch.equal(led.task_1[2:], plain.task_1[2:] + lead_D)
    assert not torch.equal(plain.task_1[:2], plain.task_0)


def test_fresh_routers_can_be_dropped_and_frozen_ones_do_not_train() -> None:
    routers = make_routers([2])
    routers.freeze()
    routers.grow(3, torch.device("cpu"), torch.Generator())
    assert [weight.requires_grad for weight in routers.parameters()] == [False, True]
    assert routers.new_experts(1) == range(2, 3)
    routers.drop_fresh()
    assert routers.widths == [2] and list(routers.state_dict()) == ["task_0"]


def test_a_gate_is_a_tuple_of_tensors_as_zero_3_looks_for_them() -> None:
    seen = make_routers([2])(states(1, 2), RoutePlan.single(0))
    assert isinstance(seen, tuple) and all(isinstance(value, Tensor) for value in seen)


def test_mistakes_are_named() -> None:
    routers = make_routers([3])
    with pytest.raises(ValueError, match="for 2 samples, the batch has 3"):
        gate(routers, states(3, 2), RoutePlan.hard(torch.tensor([0, 0])))
    with pytest.raises(ValueError, match=r"mask is \(2, 9\), the forward pass \(2, 1\)"):
        routers(states(2, 1), RoutePlan.single(0)).counts(torch.ones(2, 9))
    with pytest.raises(ValueError, match="2 experts after one over 3"):
        routers.add(torch.zeros(2, D))
    with pytest.raises(ValueError, match="no task 1: 1 tasks"):
        routers.new_experts(1)
