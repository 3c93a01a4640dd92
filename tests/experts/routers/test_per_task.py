from collections.abc import Sequence

import pytest
import torch
from banks import CountOps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.base import Gate
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.records import Located

D = 24


def make_routers(known: Sequence[int | Sequence[int]], top_k: int = 2, seed: int = 0) -> TaskRouters:
    """A router per task over some experts, or over so many from 0 on."""
    generator = torch.Generator().manual_seed(seed)
    routers = TaskRouters(D, top_k)
    for some in known:
        routers.add_task(range(some) if isinstance(some, int) else some, torch.device("cpu"), generator)
    return routers


def hard(*tasks: int) -> RoutePlan:
    return RoutePlan.of(Located.at(torch.tensor(tasks)))


def states(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(seed))


def decide(routers: TaskRouters, h_BTD: Tensor, plan: RoutePlan) -> Gate:
    gate: Gate = routers(h_BTD, ForwardPass(plan))
    return gate


def gate(routers: TaskRouters, h_BTD: Tensor, plan: RoutePlan) -> Tensor:
    return decide(routers, h_BTD, plan).gate_BTE


some_of_them = st.lists(st.lists(st.integers(0, 9), max_size=5, unique=True).map(sorted), min_size=2, max_size=5)
"""What each task's router knows: any experts, also none."""

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
    plans = [RoutePlan.single(newest), hard(0, newest, -1)]
    before = [gate(routers, h_BTD, plan) for plan in plans]
    routers.freeze()
    routers.add_task(range(widths[-1]), torch.device("cpu"), torch.Generator().manual_seed(seed))
    assert all(torch.equal(gate(routers, h_BTD, plan), old) for plan, old in zip(plans, before, strict=True))


@settings(max_examples=25, deadline=None)
@given(widths=growing, top_k=st.integers(1, 4), tokens=st.sampled_from([1, 2, 7, 33]), data=st.data())
def test_a_samples_gate_does_not_depend_on_its_batch_mates(
    widths: list[int], top_k: int, tokens: int, data: st.DataObject
) -> None:
    tasks = data.draw(st.lists(st.integers(-1, len(widths) - 1), min_size=1, max_size=6).filter(lambda t: max(t) >= 0))
    routers, h_BTD = make_routers(widths, top_k), states(len(tasks), tokens)
    mixed_BTE = gate(routers, h_BTD, hard(*tasks))
    for row, task in enumerate(tasks):
        known = widths[task] if task >= 0 else 0
        assert not mixed_BTE[row, :, known:].any()
        if task >= 0:
            alone = gate(routers, h_BTD[row : row + 1], RoutePlan.single(task))[0]
            whole_batch = gate(routers, h_BTD, RoutePlan.single(task))[row]
            assert torch.equal(mixed_BTE[row, :, :known], alone) and torch.equal(whole_batch, alone)


@settings(max_examples=40, deadline=None)
@given(known=some_of_them, top_k=st.integers(1, 4), tokens=st.sampled_from([1, 5]), data=st.data())
def test_a_task_chooses_among_the_experts_it_knows_whatever_its_batch_mates_know(
    known: list[list[int]], top_k: int, tokens: int, data: st.DataObject
) -> None:
    tasks = data.draw(st.lists(st.integers(-1, len(known) - 1), min_size=1, max_size=6))
    routers, h_BTD = make_routers(known, top_k), states(len(tasks), tokens)
    mixed = decide(routers, h_BTD, hard(*tasks))
    union = sorted({expert for task in tasks if task >= 0 for expert in known[task]})
    if not union:
        assert mixed is None
        return
    assert list(mixed.ids) == union and mixed.gate_BTE.shape[-1] == len(union)
    counts_E = torch.zeros(10, dtype=torch.long)
    for row, task in enumerate(tasks):
        wide_TE = torch.zeros(tokens, 10)
        wide_TE[:, union] = mixed.gate_BTE[row]
        mine = known[task] if task >= 0 else []
        wanted_TE = torch.zeros(tokens, 10)
        if mine:
            plain = TaskRouters(D, top_k)
            plain.add(routers.weight(task))
            wanted_TE[:, mine] = gate(plain, h_BTD[row : row + 1], RoutePlan.single(0))[0]
        assert torch.equal(wide_TE, wanted_TE)
        counts_E += (wanted_TE > 0).sum(dim=0)
    assert mixed.counts(None).tolist() == counts_E[union].tolist()


def test_among_equal_logits_the_oldest_experts_win() -> None:
    routers = TaskRouters(D, top_k=2)
    routers.add(torch.ones(40, D))
    gate_BTE = gate(routers, states(2, 50), RoutePlan.single(0))
    assert torch.equal(gate_BTE[..., :2], torch.full((2, 50, 2), 0.5)) and not gate_BTE[..., 2:].any()


def test_a_soft_plan_mixes_the_gates_of_its_tasks_by_weight() -> None:
    routers, h_BTD = make_routers([2, 4]), states(2, 3)
    old = torch.nn.functional.pad(gate(routers, h_BTD, RoutePlan.single(0)), (0, 2))
    new = gate(routers, h_BTD, RoutePlan.single(1))
    for rows in (1, 2):
        tasks_BK, weights_BK = torch.tensor([[1, 0]]).expand(rows, 2), torch.tensor([[0.75, 0.25]]).expand(rows, 2)
        plan = RoutePlan.of(Located(tasks_BK, weights_BK))
        torch.testing.assert_close(gate(routers, h_BTD, plan), 0.75 * new + 0.25 * old)


def test_rows_that_know_no_expert_have_a_zero_gate_and_finite_gradients() -> None:
    routers = make_routers([0, 3])  # the site had no experts when task 0 was learned
    h_BTD = states(3, 4).requires_grad_()
    plan = hard(0, -1, 1)
    gate_BTE = gate(routers, h_BTD, plan)
    assert not gate_BTE[:2].any() and gate_BTE[2].sum() > 0
    decide(routers, h_BTD, plan).probability(None)[0].backward()
    assert h_BTD.grad is not None and h_BTD.grad.isfinite().all()
    assert not h_BTD.grad[:2].any() and routers.task_1.grad.any()


def test_counts_and_probabilities_leave_out_pads_unknown_experts_and_rows_without_experts() -> None:
    routers, h_BTD = make_routers([1, 3]), states(3, 4)
    mask_BT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    seen = decide(routers, h_BTD, hard(0, -1, 1))
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


def test_what_a_new_router_starts_with_is_made_of_what_is_drawn() -> None:
    started, plain = make_routers([2]), make_routers([2])
    started.add_task(range(4), torch.device("cpu"), torch.Generator().manual_seed(5), lambda drawn_ED: 2 * drawn_ED)
    plain.add_task(range(4), torch.device("cpu"), torch.Generator().manual_seed(5))
    assert torch.equal(started.task_1, 2 * plain.task_1)
    assert not torch.equal(plain.task_1[:2], plain.task_0)


def test_new_routers_can_be_discarded_and_frozen_ones_do_not_train() -> None:
    routers = make_routers([2])
    routers.freeze()
    routers.add_task((0, 2), torch.device("cpu"), torch.Generator())
    assert [weight.requires_grad for weight in routers.parameters()] == [False, True]
    routers.discard_trainable()
    assert routers.known == [(0, 1)] and list(routers.state_dict()) == ["task_0"]


def test_a_gate_is_a_tuple_of_tensors_as_zero_3_looks_for_them() -> None:
    seen = decide(make_routers([2]), states(1, 2), RoutePlan.single(0))
    assert isinstance(seen, tuple) and type(seen)(*seen) == seen  # it is made anew from its parts
    assert all(isinstance(value, Tensor | bool) for value in seen if value is not seen.ids)
    assert seen.ids == seen.logit_ids == (0, 1)


def test_where_no_expert_takes_part_there_is_no_gate() -> None:
    routers = make_routers([0, 2])  # the site had no experts when task 0 was learned
    for tasks in ((0, 0), (-1, 0), (-1, -1)):
        assert routers(states(2, 3), ForwardPass(hard(*tasks))) is None
    assert routers(states(2, 3), ForwardPass(RoutePlan.single(-1))) is None
    assert routers(states(2, 3), ForwardPass(hard(0, 1))) is not None


def test_rows_that_are_images_go_by_their_own_samples_tasks() -> None:
    routers, sample_I = make_routers([2, 4]), torch.tensor([1, 0, 1, 2])
    plan = hard(0, 1, -1)
    for tokens in (1, 5):  # patches in one sequence, or pictures
        h_ITD = states(len(sample_I), tokens)
        gate_ITE = routers(h_ITD, ForwardPass(plan, sample_I=sample_I)).gate_BTE
        for row, sample in enumerate(sample_I.tolist()):
            alone = gate(routers, h_ITD[row : row + 1], hard(sample)) if sample < 2 else None
            width = 0 if alone is None else alone.shape[-1]
            assert not gate_ITE[row, :, width:].any()
            assert alone is None or torch.equal(gate_ITE[row, :, :width], alone[0])


def test_a_routers_state_comes_back_and_its_shape_is_known_before() -> None:
    original, restored = make_routers([0, 2, (0, 3, 4), 5, (0, 1)]), TaskRouters(D, top_k=2)
    for task, num_experts in enumerate((0, 2, 5, 5, 5)):
        state, width = original.state_of(task), len(original.known[task])
        assert {name: tuple(value.shape) for name, value in state.items()} == restored.shapes_of_next(
            num_experts, state
        )
        assert ("router_ids" in state) == (width < num_experts)
        restored.restore_next(state, torch.device("cpu"))
        assert [parameter.requires_grad for parameter in restored.parameters()] == [False] * max(task - 1, 0) + (
            [True] if width else []
        )
        restored.freeze()
    assert restored.known == original.known
    assert all(torch.equal(one, other) for one, other in zip(restored.parameters(), original.parameters(), strict=True))
    state["router"].zero_()
    assert original.task_4.any() and restored.task_4.any()  # copies


def test_mistakes_are_named() -> None:
    routers = make_routers([3])
    with pytest.raises(ValueError, match="for 2 samples, the batch has 3"):
        gate(routers, states(3, 2), hard(0, -1))
    with pytest.raises(ValueError, match=r"mask is \(2, 9\), the forward pass \(2, 1\)"):
        decide(routers, states(2, 1), RoutePlan.single(0)).counts(torch.ones(2, 9))
    with pytest.raises(ValueError, match="names task 1, but 1 tasks have routers"):
        gate(routers, states(1, 2), RoutePlan.single(1))
    for named in ([0, 3], [2, 1], [1, 1], [-1, 0], []):
        with pytest.raises(ValueError, match=r"router_ids: .*names experts of the 3 that there are, ascending"):
            routers.shapes_of_next(3, {"router_ids": torch.tensor(named)})


@torch.no_grad()
def test_a_step_of_decoding_costs_as_many_operations_whatever_the_number_of_tasks() -> None:
    counted = {}
    for num_tasks in (2, 8, 32):
        routers = make_routers([range(2 * max(task - 1, 0), 2 * task + 2) for task in range(num_tasks)])
        plan = hard(*(task % num_tasks for task in range(32)))
        first = gate(routers, states(32, 3), plan)
        with CountOps() as decoding:
            again = gate(routers, states(32, 3)[:, -1:], plan)
        torch.testing.assert_close(again, first[:, -1:])
        counted[num_tasks] = decoding.ops
    assert counted[2] == counted[8] == counted[32]
