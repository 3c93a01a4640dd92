import pytest
import torch

from llava_cmoe.experts.context import RouteContext
from llava_cmoe.experts.observation import Observation


def test_balance_loss_equals_the_value_computed_by_hand() -> None:
    seen = Observation()
    # Site a: 4 tokens, k = 1, F = (3/4, 1/4), P = (0.6, 0.4): 2 * (0.45 + 0.1) = 1.1. Site b: uniform: 1.
    seen.add("a", torch.tensor([2, 0]), torch.tensor([1.5, 0.5]))
    seen.add("a", torch.tensor([1, 1]), torch.tensor([0.9, 1.1]))
    seen.add("b", torch.tensor([4, 4, 4]), torch.tensor([2.0, 2.0, 2.0]))
    torch.testing.assert_close(seen.balance_loss(), torch.tensor((1.1 + 1.0) / 2))
    assert seen.counts["a"].tolist() == [3, 1]


def test_balance_loss_has_a_gradient_through_the_probabilities_alone() -> None:
    seen, probability_E = Observation(), torch.tensor([1.5, 0.5], requires_grad=True)
    seen.add("a", torch.tensor([2, 0]), probability_E)
    seen.balance_loss().backward()
    assert probability_E.grad is not None
    torch.testing.assert_close(probability_E.grad, torch.tensor([2 * 1.0 / 2, 0.0]))  # n * F / tokens


def test_balance_loss_of_nothing_and_of_mixed_widths_are_errors() -> None:
    seen = Observation()
    with pytest.raises(ValueError, match="context.use"):
        seen.balance_loss()
    seen.add("a", torch.tensor([1]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="a: observed experts 0, 1 after 0;"):
        seen.add("a", torch.tensor([1, 0]), torch.tensor([0.5, 0.5]))


def test_what_runs_again_in_backward_is_not_counted_again() -> None:
    context = RouteContext()
    with context.observe() as seen:
        counts_E, probability_E = torch.tensor([3, 1]), torch.tensor([2.0, 2.0])
        seen.add("a", counts_E, probability_E)
        loss = seen.balance_loss()
        seen.add("a", counts_E, probability_E)  # as a checkpointed layer does
    assert torch.equal(seen.counts["a"], counts_E) and seen.balance_loss() == loss


def test_observation_ends_with_its_block() -> None:
    context = RouteContext()
    with context.observe() as outer:
        with context.observe() as inner:
            assert context.observation is inner
        assert context.observation is outer
    assert context.observation is None
