"""An expert that is not used, or that computes what another one computes, can be left out; nothing else can."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from llava_cmoe.backbones.sites import ffn_sites
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.surgery import ExpertHost, install
from llava_cmoe.merging.merge_map import StandIns
from llava_cmoe.merging.redundancy import Redundancy, stand_ins_of

TOKENS = torch.arange(4, 20).view(2, 8)
MASK = torch.ones(2, 8, dtype=torch.bool)


@pytest.fixture
def host(tiny_llava: LlavaForConditionalGeneration) -> ExpertHost:
    """Per layer two experts of a first task and two of a second, all of which do something."""
    generator = torch.Generator().manual_seed(0)
    host = install(tiny_llava, ffn_sites(tiny_llava), rank=3, alpha=6.0, top_k=2)
    for _ in range(2):
        for bank in host.banks.values():
            bank.grow(2, generator=generator)
            bank.add_router(generator=generator)
            for stack in bank.stacks.values():
                stack.fresh.B.data.uniform_(-0.5, 0.5, generator=generator)
        host.freeze()
    return host


def twins(host: ExpertHost, older: int, newer: int) -> str:
    """Makes two experts of the first site one and the same; says which site."""
    site, bank = next(iter(host.banks.items()))
    for stack in bank.stacks.values():
        stack.frozen.A.data[newer] = stack.frozen.A.data[older]
        stack.frozen.B.data[newer] = stack.frozen.B.data[older]
    return site


def logits(model: LlavaForConditionalGeneration, host: ExpertHost, plan: RoutePlan) -> Tensor:
    with torch.no_grad(), host.context.use(plan):
        logits_BTV: Tensor = model(input_ids=TOKENS).logits
    return logits_BTV


@contextmanager
def merged(host: ExpertHost, merge: dict[str, StandIns]) -> Iterator[None]:
    whole = {site: host.banks[site].merge(stand_ins) for site, stand_ins in merge.items()}
    yield
    for site, blocks in whole.items():
        host.banks[site].unmerge(blocks)


def watched(model: LlavaForConditionalGeneration, host: ExpertHost) -> Redundancy:
    redundancy = Redundancy(host)
    with redundancy.watch():
        for task in range(2):
            logits(model, host, RoutePlan.single(task, MASK))
    return redundancy


PLANS = [RoutePlan.single(0), RoutePlan.single(1), RoutePlan.hard(torch.tensor([1, 0]))]


@pytest.mark.parametrize("plan", PLANS)
def test_a_twin_stands_in_without_a_trace(tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, plan: RoutePlan):
    site = twins(host, older=1, newer=3)
    before = logits(tiny_llava, host, plan)
    with merged(host, {site: StandIns((0, 1, 2, 1), (1, 0.5, 1, 0.5))}):
        assert host.banks[site].num_experts == 3
        torch.testing.assert_close(logits(tiny_llava, host, plan), before, rtol=0, atol=1e-5)
    assert host.banks[site].num_experts == 4
    assert torch.equal(logits(tiny_llava, host, plan), before)


def test_tasks_from_before_an_expert_keep_their_bits_when_it_is_left_out(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost
):
    before = [logits(tiny_llava, host, RoutePlan.single(task)) for task in range(2)]
    with merged(host, dict.fromkeys(host.banks, StandIns((0, 1, 0, -1), (1, 1, 0, 0)))):
        assert torch.equal(logits(tiny_llava, host, RoutePlan.single(0)), before[0])
        assert not torch.equal(logits(tiny_llava, host, RoutePlan.single(1)), before[1])


def test_a_task_whose_experts_are_all_dropped_is_the_base_model_there(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost
):
    base = logits(tiny_llava, host, RoutePlan.single(-1))
    with merged(host, dict.fromkeys(host.banks, StandIns((-1, -1, 2, 3), (0, 0, 1, 1)))):
        assert torch.equal(logits(tiny_llava, host, RoutePlan.single(0)), base)


def test_the_first_step_is_the_twin_and_costs_nothing(tiny_llava: LlavaForConditionalGeneration, host: ExpertHost):
    site = twins(host, older=0, newer=2)
    first, second, *_ = watched(tiny_llava, host).steps()
    assert (first.site, first.expert, first.stand_in) == (site, 2, 0)
    assert first.loss < 1e-6 < second.loss


@pytest.mark.parametrize("tokens", [1024, 3])
def test_what_is_lost_is_what_joining_or_dropping_changes(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, monkeypatch: pytest.MonkeyPatch, tokens: int
):
    """Of one linear that reads the same either way: the FFN's first; however many tokens are held at a time."""
    monkeypatch.setattr("llava_cmoe.merging.redundancy.TOKENS", tokens)
    site, bank = next(iter(host.banks.items()))
    stack = bank.stacks["gate_proj"]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hook = stack.register_forward_hook(lambda stack, args, output: seen.append((*args, output)))
    redundancy = Redundancy(host)
    with redundancy.watch():
        for task in range(2):
            logits(tiny_llava, host, RoutePlan.single(task, MASK))
    hook.remove()
    redundancy._sums = {key: value for key, value in redundancy._sums.items() if key[2] == "gate_proj"}
    sums = redundancy.relative()[site]

    def changed(gates: Callable[[Tensor], Tensor]) -> float:
        total = 0.0
        for x_BTI, gate_BTE, whole_BTO in seen:
            all_BTE = functional.pad(gate_BTE, (0, 4 - gate_BTE.shape[-1]))
            total += float(stack(x_BTI, gates(all_BTE)).square().sum() / whole_BTO.square().sum())
        return total / len(bank.stacks)

    def dropped(gate_BTE: Tensor) -> Tensor:
        return gate_BTE * torch.tensor([0.0, 1, 0, 0])

    def joined(gate_BTE: Tensor, newer: int, older: int, share: float) -> Tensor:
        """What the two add minus what their mean adds, told as a gate."""
        change_BTE = torch.zeros_like(gate_BTE)
        both_BT = gate_BTE[..., newer] + gate_BTE[..., older]
        change_BTE[..., newer] = gate_BTE[..., newer] - share * both_BT
        change_BTE[..., older] = gate_BTE[..., older] - (1 - share) * both_BT
        return change_BTE

    assert float(sums.none_E[1]) == pytest.approx(changed(dropped), rel=1e-4)
    for newer, older in ((1, 0), (3, 2), (2, 0)):
        share = float(sums.share_EE()[newer, older])
        least = changed(partial(joined, newer=newer, older=older, share=share))
        assert float(sums.loss_EE()[newer, older]) == pytest.approx(least, rel=1e-3) and 0 < share < 1
        for other in (share - 0.02, share + 0.02):
            assert changed(partial(joined, newer=newer, older=older, share=other)) > least


def test_a_mean_is_the_closest_expert_and_exact_where_one_can_be(host: ExpertHost):
    stack = next(iter(host.banks.values())).stacks["up_proj"]
    block = stack.frozen
    assert block is not None

    def products(a_RI: Tensor, b_RO: Tensor) -> Tensor:
        return b_RO.mT @ a_RI

    wanted_OI = sum(share * products(block.A[e], block.B[e]) for e, share in ((0, 0.25), (2, 0.5), (3, 0.25)))
    whole = stack.keep(StandIns((0, 1, 0, 0), (0.25, 1, 0.5, 0.25)))
    mean_OI = products(stack.frozen.A[0], stack.frozen.B[0])
    tail_R = torch.linalg.svdvals(wanted_OI)[3:]
    assert float((mean_OI - wanted_OI).norm()) == pytest.approx(float(tail_R.norm()), rel=1e-4)
    assert torch.equal(stack.frozen.A[1], whole.A[1]) and stack.frozen.num_experts == 2

    whole.A.data[2] = whole.A[0]  # they read the same, so that a mean of all ranks is one expert
    stack.frozen = whole
    wanted_OI = 0.25 * products(whole.A[0], whole.B[0]) + 0.75 * products(whole.A[2], whole.B[2])
    stack.keep(StandIns((0, 1, 0, 3), (0.25, 1, 0.75, 1)))
    torch.testing.assert_close(products(stack.frozen.A[0], stack.frozen.B[0]), wanted_OI, rtol=0, atol=1e-6)


def test_of_every_site_one_expert_stays_and_every_step_makes_a_merge(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost
):
    steps = list(watched(tiny_llava, host).steps())
    assert 2 * 2 <= len(steps) <= 2 * 3 and all(0 <= step.share <= 1 for step in steps)
    assert [step.loss for step in steps] == sorted(step.loss for step in steps)
    for number in range(len(steps) + 1):
        merge = stand_ins_of(steps[:number], host)
        assert sum(4 - len(stand_ins.kept) for stand_ins in merge.values()) == number
        assert all(stand_ins.kept for stand_ins in merge.values())
        for stand_ins in merge.values():
            assert [sum(stand_ins.mean_of(expert).values()) for expert in stand_ins.kept] == pytest.approx(
                [1.0] * len(stand_ins.kept)
            )


@pytest.mark.parametrize("of_E", [(1, 1), (0, 2, 2), (0, 0, 1), (-2,)])
def test_what_cannot_stand_in_is_refused(of_E: tuple[int, ...]):
    with pytest.raises(ValueError, match="cannot stand in"):
        StandIns(of_E, (1.0,) * len(of_E))


def test_stand_ins_of_another_pool_are_refused(host: ExpertHost):
    with pytest.raises(ValueError, match="stand-ins for 3 experts, the site has 4"):
        next(iter(host.banks.values())).merge(StandIns((0, 1, 2), (1, 1, 1)))
