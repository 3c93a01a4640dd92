"""An expert that is not used, or that computes what another one computes, can be left out; nothing else can."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from banks import add_task_that_knows, logits_under, make_twins
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.surgery import ExpertHost
from llava_cmoe.merging.redundancy import Redundancy, merge_map_of


def watched(model: LlavaForConditionalGeneration, host: ExpertHost) -> Redundancy:
    redundancy = Redundancy(host)
    with redundancy.watch():
        for task in range(2):
            logits_under(model, host, RoutePlan.single(task))
    return redundancy


def test_the_first_step_is_the_twin_and_costs_nothing(tiny_llava: LlavaForConditionalGeneration, host: ExpertHost):
    site = make_twins(host, older=0, newer=2)
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
    seen: list[tuple[Tensor, Tensor, Sequence[int], Tensor]] = []
    hook = stack.register_forward_hook(lambda stack, args, output: seen.append((*args[:3], output)))
    add_task_that_knows(host, [1, 2])
    redundancy = Redundancy(host)
    with redundancy.watch():
        for task in range(3):
            logits_under(tiny_llava, host, RoutePlan.single(task))
    hook.remove()
    redundancy._sums = {key: value for key, value in redundancy._sums.items() if key[2] == "gate_proj"}
    sums = redundancy.relative()[site]

    def changed(gates: Callable[[Tensor], Tensor]) -> float:
        total = 0.0
        for x_BTI, gate_BTE, ids, whole_BTO in seen:
            all_BTE = gate_BTE.new_zeros(*gate_BTE.shape[:2], 4)
            all_BTE[..., list(ids)] = gate_BTE
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


def test_of_every_site_one_expert_stays_and_every_step_makes_a_merge(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost
):
    steps = list(watched(tiny_llava, host).steps())
    assert 2 * 2 <= len(steps) <= 2 * 3 and all(0 <= step.share <= 1 for step in steps)
    assert [step.loss for step in steps] == sorted(step.loss for step in steps)
    for number in range(len(steps) + 1):
        merge = merge_map_of(steps[:number], host)
        assert sum(4 - len(stand_ins.kept) for stand_ins in merge.values()) == number
        assert all(stand_ins.kept for stand_ins in merge.values())
        for stand_ins in merge.values():
            assert [sum(stand_ins.mean_of(expert).values()) for expert in stand_ins.kept] == pytest.approx(
                [1.0] * len(stand_ins.kept)
            )


def test_watching_needs_to_know_which_tokens_are_padding(tiny_llava: LlavaForConditionalGeneration, host: ExpertHost):
    with Redundancy(host).watch(), host.context.use(RoutePlan.single(0)), pytest.raises(AssertionError, match="a mask"):
        tiny_llava(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_padding_counts_for_nothing(tiny_llava: LlavaForConditionalGeneration, host: ExpertHost):
    text = torch.arange(4, 10)[None]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), text], dim=1)
    sums = []
    for input_ids in (text, padded):
        redundancy, mask = Redundancy(host), (input_ids > 0).long()
        batch = {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
        with redundancy.watch(), torch.no_grad(), host.context.use(RoutePlan.single(1), batch):
            tiny_llava(**batch)
        sums.append(redundancy.relative())
    for site, expected in sums[0].items():
        torch.testing.assert_close(sums[1][site].p_EE, expected.p_EE, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(sums[1][site].none_E, expected.none_E, rtol=1e-4, atol=1e-9)
