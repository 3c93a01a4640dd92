"""A merged bank answers with fewer experts; taken back, it is what it was, to the last bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from banks import GivenGate, Parts, add_task_that_knows, logits_under, make_twins
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llava_cmoe.backbones.sites import Site
from llava_cmoe.experts import grouped
from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.state import restore, state_of
from llava_cmoe.experts.surgery import ExpertHost, install
from llava_cmoe.merging.merge_map import MergeMap
from llava_cmoe.merging.merged_bank import merge, unmerge
from llava_cmoe.records import Located

PLANS = [RoutePlan.single(0), RoutePlan.single(1), RoutePlan.of(Located.at(torch.tensor([1, 0])))]
SELECTED = [0, 3]
"""Experts that a third task knows."""
MIXED = RoutePlan.of(Located(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])))
MAPS = [
    MergeMap((0, 1, 2, 1), (1, 0.5, 1, 0.5)),
    MergeMap((0, 1, 0, -1), (0.25, 1, 0.75, 0)),
    MergeMap((0, 0, 0, 0), (0.4, 0.3, 0.2, 0.1)),
    MergeMap((-1, -1, 2, 3), (0, 0, 1, 1)),
    MergeMap((0, 1, 2, 3), (1, 1, 1, 1)),
]


@contextmanager
def merged(host: ExpertHost, maps: dict[str, MergeMap]) -> Iterator[None]:
    whole = {site: merge(host.banks[site], merge_map) for site, merge_map in maps.items()}
    yield
    for site, before in whole.items():
        unmerge(host.banks[site], before)


@pytest.mark.parametrize("merge_map", MAPS, ids=lambda one: str(one.of_E))
def test_a_merge_taken_back_leaves_every_logit_and_every_module_as_it_was(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, merge_map: MergeMap
):
    plans = [*PLANS, MIXED, RoutePlan.single(-1), None]
    before = [logits_under(tiny_llava, host, plan) for plan in plans]
    modules = dict(tiny_llava.named_modules())
    tensors = {name: value.clone() for name, value in tiny_llava.state_dict().items()}
    for _ in range(2):
        with merged(host, dict.fromkeys(host.banks, merge_map)):
            during = [logits_under(tiny_llava, host, plan) for plan in plans]
            assert all(bank.num_experts == len(merge_map.kept) for bank in host.banks.values())
        assert [torch.equal(*pair) for pair in zip(during[-2:], before[-2:], strict=True)] == [True, True]
        after = [logits_under(tiny_llava, host, plan) for plan in plans]
        assert all(torch.equal(*pair) for pair in zip(after, before, strict=True))
        now = dict(tiny_llava.named_modules())
        assert now.keys() == modules.keys() and all(now[name] is module for name, module in modules.items())
        state = tiny_llava.state_dict()
        assert state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)
    assert any(not torch.equal(*pair) for pair in zip(during, before, strict=True)) == (merge_map is not MAPS[-1])


@pytest.mark.parametrize("merge_map", MAPS, ids=lambda one: str(one.of_E))
def test_what_a_task_trained_is_told_as_before_in_a_merged_bank(host: ExpertHost, merge_map: MergeMap):
    before = [state_of(host.banks, task) for task in range(2)]
    with merged(host, dict.fromkeys(host.banks, merge_map)):
        during = [state_of(host.banks, task) for task in range(2)]
    for one, other in zip(before, during, strict=True):
        assert one.experts.keys() == other.experts.keys() == set() and one.routers.keys() == other.routers.keys()
        assert one.routers and all(torch.equal(one.routers[name], other.routers[name]) for name in one.routers)


def test_a_bank_that_is_still_learning_is_refused(host: ExpertHost):
    bank = next(iter(host.banks.values()))
    bank.grow(1, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"\(4,\) are still learning"):
        merge(bank, MergeMap((0, 1, 2, 3, 4), (1,) * 5))
    assert bank.trainable_ids == (4,) and bank.num_experts == 5 and isinstance(bank.router, TaskRouters)


def test_a_merged_bank_learns_nothing(host: ExpertHost):
    states = [state_of(host.banks, task) for task in range(2)]
    with merged(host, dict.fromkeys(host.banks, MAPS[0])):
        with pytest.raises(ValueError, match="a merged bank only answers"):
            restore(host.banks, states[0])
        host.discard_trainable()
        host.freeze()
        assert not any(parameter.requires_grad for bank in host.banks.values() for parameter in bank.parameters())
        assert all(bank.num_experts == 3 for bank in host.banks.values())


@pytest.mark.parametrize("plan", [*PLANS, MIXED])
def test_a_twin_stands_in_without_a_trace(tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, plan: RoutePlan):
    site = make_twins(host, older=1, newer=3)
    before = logits_under(tiny_llava, host, plan)
    with merged(host, {site: MergeMap((0, 1, 2, 1), (1, 0.5, 1, 0.5))}):
        assert host.banks[site].num_experts == 3
        torch.testing.assert_close(logits_under(tiny_llava, host, plan), before, rtol=0, atol=1e-5)
    assert host.banks[site].num_experts == 4
    assert torch.equal(logits_under(tiny_llava, host, plan), before)


def test_tasks_from_before_an_expert_keep_their_bits_when_it_is_left_out(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost
):
    before = [logits_under(tiny_llava, host, RoutePlan.single(task)) for task in range(2)]
    with merged(host, dict.fromkeys(host.banks, MergeMap((0, 1, 0, -1), (1, 1, 0, 0)))):
        assert torch.equal(logits_under(tiny_llava, host, RoutePlan.single(0)), before[0])
        assert not torch.equal(logits_under(tiny_llava, host, RoutePlan.single(1)), before[1])


def test_a_task_whose_experts_are_all_dropped_is_the_base_model_there(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost
):
    base = logits_under(tiny_llava, host, RoutePlan.single(-1))
    with merged(host, dict.fromkeys(host.banks, MergeMap((-1, -1, 2, 3), (0, 0, 1, 1)))):
        assert torch.equal(logits_under(tiny_llava, host, RoutePlan.single(0)), base)


@pytest.mark.parametrize("task", [1, 2])
def test_the_choices_that_are_counted_are_those_of_the_whole_bank(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, task: int
):
    add_task_that_knows(host, SELECTED)
    first = next(iter(host.banks))  # what deeper sites read is another state once this one is merged

    def counted() -> dict[int, int]:
        with host.context.observe() as seen:
            logits_under(tiny_llava, host, RoutePlan.single(task))
        return dict(zip(seen.ids[first], seen.counts[first].tolist(), strict=True))

    before = counted()
    with merged(host, dict.fromkeys(host.banks, MAPS[1])):
        assert counted() == before and sum(before.values()) == 2 * 2 * 8
    assert list(before) == ([0, 1, 2, 3] if task == 1 else SELECTED)


@pytest.mark.parametrize("merge_map", MAPS, ids=lambda one: str(one.of_E))
def test_of_a_task_that_knows_some_experts_a_merge_moves_only_what_it_gives_to_those_left_out(
    host: ExpertHost, merge_map: MergeMap
):
    add_task_that_knows(host, SELECTED)
    bank = next(iter(host.banks.values()))
    h_BTD, plan = torch.randn(2, 5, bank.hidden_size), RoutePlan.single(2)
    plain = bank.router(h_BTD, ForwardPass(plan))
    with merged(host, {bank.site.name: merge_map}):
        gate = bank.router(h_BTD, ForwardPass(plan))
    wanted_BTS = torch.zeros(2, 5, len(merge_map.kept))
    for column, expert in enumerate(SELECTED):
        if merge_map.of_E[expert] >= 0:
            wanted_BTS[..., merge_map.kept.index(merge_map.of_E[expert])] += plain.gate_BTE[..., column]
    assert plain.ids == (0, 3) and gate.ids is None
    torch.testing.assert_close(gate.gate_BTE, wanted_BTS)


@pytest.mark.parametrize("merge_map", MAPS, ids=lambda one: str(one.of_E))
@pytest.mark.parametrize("plan", PLANS)
def test_it_adds_the_same_where_tokens_are_sorted_by_expert(
    tiny_llava: LlavaForConditionalGeneration,
    host: ExpertHost,
    merge_map: MergeMap,
    plan: RoutePlan,
    monkeypatch: pytest.MonkeyPatch,
):
    found = []
    for limit in (10**9, 0):
        monkeypatch.setitem(grouped.RANK_PER_SLOT, "cpu", limit)
        monkeypatch.setattr(grouped, "ALIGNED", 1)
        with merged(host, dict.fromkeys(host.banks, merge_map)):
            found.append(logits_under(tiny_llava, host, plan))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_a_mean_is_the_closest_expert_and_exact_where_one_can_be(host: ExpertHost):
    bank = next(iter(host.banks.values()))
    stack = bank.stacks["up_proj"]
    block = stack.frozen
    assert block is not None

    def products(a_RI: Tensor, b_RO: Tensor) -> Tensor:
        return b_RO.mT @ a_RI

    wanted_OI = sum(share * products(block.A[e], block.B[e]) for e, share in ((0, 0.25), (2, 0.5), (3, 0.25)))
    whole = merge(bank, MergeMap((0, 1, 0, 0), (0.25, 1, 0.5, 0.25)))
    mean_OI = products(stack.frozen.A[0], stack.frozen.B[0])
    tail_R = torch.linalg.svdvals(wanted_OI)[3:]
    assert float((mean_OI - wanted_OI).norm()) == pytest.approx(float(tail_R.norm()), rel=1e-4)
    assert torch.equal(stack.frozen.A[1], block.A[1]) and len(stack.frozen.ids) == 2

    unmerge(bank, whole)
    assert stack.frozen is block
    block.A.data[2] = block.A[0]  # they read the same, so that a mean of all ranks is one expert
    wanted_OI = 0.25 * products(block.A[0], block.B[0]) + 0.75 * products(block.A[2], block.B[2])
    merge(bank, MergeMap((0, 1, 0, 3), (0.25, 1, 0.75, 1)))
    torch.testing.assert_close(products(stack.frozen.A[0], stack.frozen.B[0]), wanted_OI, rtol=0, atol=1e-6)


def test_stand_ins_of_another_pool_are_refused(host: ExpertHost):
    with pytest.raises(ValueError, match="stand-ins for 3 experts, the site has 4"):
        merge(next(iter(host.banks.values())), MergeMap((0, 1, 2), (1, 1, 1)))


def test_a_pool_with_a_gap_in_its_ids_is_refused():
    model = Parts(ffn=nn.Linear(4, 4))
    bank = install(model, [Site("ffn", 0, ("",))], GivenGate, rank=2, alpha=2.0).banks["ffn"]
    for expert in (0, 2):
        bank.grow(1, generator=torch.Generator(), first=expert)
    bank.freeze()
    with pytest.raises(ValueError, match=r"ffn: .*the ids \(0, 2\)"):
        merge(bank, MergeMap((0, 0), (0.5, 0.5)))
    assert bank.ids == (0, 2)
