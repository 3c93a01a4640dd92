"""Incremental MoELoRA and LLaVA-DyMoE by their formulas: who is chosen, who is kept away, and what that costs."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Lesson
from torch import Tensor

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.widened import Scores, WidenedRouter
from llava_cmoe.methods.dymoe import separation
from llava_cmoe.methods.inc_moelora import balance

WIDTH = 6
PASS = ForwardPass(RoutePlan.single(0))
SIZES = {"num_old": st.integers(0, 4), "num_new": st.integers(1, 3), "top_k": st.integers(1, 3)}


def drawn(num_old: int, num_new: int, top_k: int, margin: float | None, seed: int) -> tuple[WidenedRouter, Tensor]:
    """A router that is learning, after a task of `num_old` experts, and states of two rows of four tokens."""
    generator = torch.Generator().manual_seed(seed)
    router = WidenedRouter(WIDTH, top_k, margin).train()
    for num in filter(None, (num_old, num_new)):
        router.freeze()
        router.add_task(torch.randn(num, WIDTH, generator=generator))
    return router, torch.randn(2, 4, WIDTH, generator=generator)


def by_hand(router: WidenedRouter, h_D: Tensor, guided: bool) -> Tensor:
    """Gate (E,) of one token, in float64."""
    assert router.newest is not None
    num_old = len(router.frozen_ED)
    score_E = torch.cat([router.frozen_ED, router.newest.detach()]).double() @ h_D.double()
    allowed = list(range(len(score_E)))
    if guided and num_old:
        old, new = float(score_E[:num_old].max()), float(score_E[num_old:].max())
        if not (new > old and abs(new - old) / max(abs(new), abs(old)) > router.margin):
            allowed = allowed[:num_old]
    best = sorted(allowed, key=lambda expert: -float(score_E[expert]))[: router.top_k]
    gate_E = torch.zeros(len(score_E), dtype=torch.float64)
    gate_E[best] = score_E[best].softmax(dim=0)
    return gate_E


@given(**SIZES, margin=st.sampled_from([None, 0.0, 0.2, 1.5]), learning=st.booleans(), seed=st.integers(0, 99))
def test_a_token_weighs_its_best_experts_and_is_kept_from_new_ones_only_while_it_learns(
    num_old: int, num_new: int, top_k: int, margin: float | None, learning: bool, seed: int
):
    router, h_BTD = drawn(num_old, num_new, top_k, margin, seed)
    gate_BTE = router.train(learning)(h_BTD, PASS).gate_BTE
    for h_D, gate_E in zip(h_BTD.flatten(0, 1), gate_BTE.flatten(0, 1), strict=True):
        expected_E = by_hand(router, h_D, guided=learning and margin is not None)
        torch.testing.assert_close(gate_E.double(), expected_E, rtol=1e-4, atol=1e-5)


@given(**SIZES, seed=st.integers(0, 99))
def test_losses_are_their_formulas_and_padding_is_none_of_their_business(
    num_old: int, num_new: int, top_k: int, seed: int
):
    router, h_BTD = drawn(num_old, num_new, top_k, 0.2, seed)
    router(h_BTD, PASS)
    scores = router.take()
    mask_BT = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    weight_BT = mask_BT / mask_BT.sum()
    w_ME = scores.logits_BTE.double().softmax(dim=-1)[mask_BT.bool()]
    old_M, new_M = w_ME[:, :num_old].sum(1), w_ME[:, num_old:].sum(1)
    if num_old:
        target_M = 1 - w_ME[:, :num_old].amax(1)
        special_M = -(target_M * new_M.log() + (1 - target_M) * (1 - new_M).log())
        expected = (old_M * new_M).mean() + special_M.mean()
        torch.testing.assert_close(separation(scores, weight_BT).double(), expected, rtol=1e-4, atol=1e-5)
    among_MN = scores.logits_BTE.double()[mask_BT.bool()][:, num_old:].softmax(dim=-1)
    chosen_MC = scores.slots_BTC[mask_BT.bool()]
    uses_N = torch.tensor([float((chosen_MC == num_old + new).sum()) for new in range(num_new)])
    expected = num_new * sum(uses_N / max(1.0, float(uses_N.sum())) * among_MN.mean(0))
    torch.testing.assert_close(balance(scores, weight_BT).double(), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def test_losses_move_new_rows_and_no_old_ones():
    router, h_BTD = drawn(num_old=3, num_new=2, top_k=2, margin=0.2, seed=0)
    router(h_BTD.requires_grad_(), PASS)
    scores = router.take()
    weight_BT = torch.full((2, 4), 1 / 8)
    (balance(scores, weight_BT) + separation(scores, weight_BT)).backward()
    assert router.newest is not None and router.newest.grad is not None and router.newest.grad.abs().min() > 0
    assert not router.frozen_ED.requires_grad


def test_equal_probabilities_on_both_sides_cost_more_than_any_certainty():
    def cost(old: float, new: float) -> float:
        return float(separation(Scores(torch.tensor([[[old, new]]]), torch.zeros(1, 1, 1), 1), torch.ones(1, 1)))

    assert cost(0.0, 0.0) > max(cost(9.0, 0.0), cost(0.0, 9.0))


@pytest.mark.parametrize("method", ["inc_moelora", "dymoe"])
def test_a_later_task_widens_the_choice_of_every_token_and_keeps_old_rows(
    method: str, lesson_of: Callable[[str], Lesson]
):
    lesson = lesson_of(method)
    for bank in lesson.run.method.host.banks.values():
        assert bank.router.frozen_ED.shape[0] == bank.num_experts == 2 * lesson.recipe.method.num_new
        assert bank.router.newest is None and bank.router.scores is None
