"""Experts become LoRA matrices: exactly under a fixed gate, as closely as least squares can under any other."""

from typing import Any

import pytest
import torch
from banks import GivenGate, Parts
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llava_cmoe.backbones.sites import Site
from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.base import Gate
from llava_cmoe.experts.surgery import ExpertHost, install
from llava_cmoe.export.exact_lora import exact_adapters
from llava_cmoe.export.fitted_lora import SiteFit
from llava_cmoe.export.lora import Adapter

WIDTHS = {"up": (6, 10), "down": (10, 6)}


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(*widths) for widths in WIDTHS.values())

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.down(self.up(h_BTD).relu())


def host_of(num_experts: int, rank: int, alpha: float = 3.0) -> ExpertHost:
    torch.manual_seed(0)
    host = install(Parts(ffn=Ffn()), [Site("ffn", 0, tuple(WIDTHS))], GivenGate, rank=rank, alpha=alpha)
    bank = host.banks["ffn"]
    bank.grow(num_experts, generator=torch.Generator().manual_seed(1))
    for stack in bank.stacks.values():
        assert stack.trainable is not None
        stack.trainable.B.data.normal_(generator=torch.Generator().manual_seed(2))
    host.freeze()
    return host


def delta(adapter: Adapter, x_BTI: Tensor) -> Tensor:
    return x_BTI @ adapter.a_FI.mT @ adapter.b_OF.mT


@given(weights=st.lists(st.sampled_from([0.0, 0.25, 1.0, -2.0]), min_size=1, max_size=5), rank=st.integers(1, 4))
def test_an_adapter_adds_what_its_experts_add(weights: list[float], rank: int):
    host = host_of(len(weights), rank)
    bank = host.banks["ffn"]
    gate_BTE = torch.tensor(weights).view(1, 1, -1)
    found = exact_adapters(host, {"ffn": dict(enumerate(weights))})
    assert set(found) == ({f"ffn.{linear}" for linear in WIDTHS} if any(weights) else set())
    for name, adapter in found.items():
        assert len(adapter.a_FI) == rank * sum(weight != 0 for weight in weights)
        linear = name.removeprefix("ffn.")
        x_BTI = torch.randn(2, 3, WIDTHS[linear][0])
        wanted = bank.stacks[linear](x_BTI, gate_BTE * bank.alpha / bank.rank)
        torch.testing.assert_close(delta(adapter, x_BTI), wanted, atol=1e-5, rtol=1e-5)


def test_an_expert_that_a_site_does_not_hold_adds_nothing():
    host = host_of(2, rank=2)
    found, alone = (exact_adapters(host, {"ffn": gate}) for gate in ({0: 0.5, 7: 1.0}, {0: 0.5}))
    assert all(torch.equal(found[name].b_OF, adapter.b_OF) for name, adapter in alone.items())


def fitted(host: ExpertHost, h_BTD: Tensor, gate_BTE: Tensor, mask_BT: Tensor) -> dict[str, Adapter]:
    bank = host.banks["ffn"]
    router: Any = bank.router
    router.gate = Gate(gate_BTE)
    fit = SiteFit(bank)
    with fit.listen(), torch.no_grad(), host.context.use(RoutePlan.single(0), {"attention_mask": mask_BT}):
        bank(h_BTD)
    return {path: one.adapter() for path, one in fit.fits.items()}


def seen(host: ExpertHost, h_BTD: Tensor, gate_BTE: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input of each linear, and what the experts add to its output."""
    bank, found = host.banks["ffn"], {}
    hooks = [
        stack.register_forward_hook(lambda _, args, added, path=path: found.update({path: (args[0], added)}))
        for path, stack in bank.stacks.items()
    ]
    bank.router.gate = Gate(gate_BTE)  # type: ignore[assignment]
    with torch.no_grad(), host.context.use(RoutePlan.single(0)):
        bank(h_BTD)
    for hook in hooks:
        hook.remove()
    return found


@given(weights=st.lists(st.sampled_from([0.25, 1.0, 2.0]), min_size=1, max_size=3))
def test_a_gate_that_does_not_move_is_fitted_exactly(weights: list[float]):
    host, h_BTD = host_of(len(weights), rank=2), torch.randn(4, 9, 6)
    gate_BTE = torch.tensor(weights).expand(4, 9, -1)
    for path, adapter in fitted(host, h_BTD, gate_BTE, torch.ones(4, 9)).items():
        x_BTI, added = seen(host, h_BTD, gate_BTE)[path]
        torch.testing.assert_close(delta(adapter, x_BTI), added, atol=1e-3, rtol=1e-3)


@given(seed=st.integers(0, 1000))
def test_no_fixed_weights_are_closer_than_what_is_fitted(seed: int):
    host, generator = host_of(3, rank=2), torch.Generator().manual_seed(seed)
    h_BTD, gate_BTE = torch.randn(4, 20, 6, generator=generator), torch.rand(4, 20, 3, generator=generator)
    found, wanted = fitted(host, h_BTD, gate_BTE, torch.ones(4, 20)), seen(host, h_BTD, gate_BTE)
    tried = torch.cat([gate_BTE.mean(dim=(0, 1), keepdim=True)[0], torch.rand(5, 3, generator=generator)])
    for path, (x_BTI, added) in wanted.items():
        error = (delta(found[path], x_BTI) - added).square().sum()
        for weights in tried.tolist():
            fixed = exact_adapters(host, {"ffn": dict(enumerate(weights))})[f"ffn.{path}"]
            assert error <= (delta(fixed, x_BTI) - added).square().sum()


def test_padding_counts_for_nothing():
    host, h_BTD, gate_BTE = host_of(2, rank=2), torch.randn(3, 8, 6), torch.rand(3, 8, 2)
    mask_BT = torch.ones(3, 8)
    mask_BT[:, 5:] = 0
    other_BTD = h_BTD.clone()
    other_BTD[:, 5:] = 100.0
    found, padded = (fitted(host, states, gate_BTE, mask_BT) for states in (h_BTD, other_BTD))
    assert all(torch.equal(adapter.b_OF, padded[path].b_OF) for path, adapter in found.items())


def test_a_pass_without_experts_is_no_pass():
    host = host_of(2, rank=2)
    router: Any = host.banks["ffn"].router
    router.gate = None
    fit = SiteFit(host.banks["ffn"])
    with fit.listen(), host.context.use(RoutePlan.single(0)):
        host.banks["ffn"](torch.randn(1, 2, 6))
    assert fit.fits == {} and isinstance(router.passes[0], ForwardPass)


@pytest.mark.parametrize("fixed", [True, False])
def test_only_a_gate_that_says_so_is_fixed(fixed: bool):
    assert Gate(torch.ones(1, 1, 2), fixed=fixed)._replace(ids=(0, 1)).fixed is fixed
