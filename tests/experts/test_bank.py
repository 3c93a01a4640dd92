from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llava_cmoe.backbones.sites import Site
from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.plan import RouteContext, RoutePlan
from llava_cmoe.experts.surgery import install

RANK, ALPHA, D, INNER = 3, 6.0, 16, 20


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, INNER), nn.Linear(INNER, D, bias=False)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.down(self.up(h_BTD).relu())


def make(
    num_per_task: list[int] = (), dtype: torch.dtype = torch.float32, top_k: int = 2, seed: int = 0
) -> tuple[nn.Module, ExpertBank, RouteContext]:
    """A model that is one FFN, its bank with experts that do something, its context."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.ModuleDict({"ffn": Ffn()})
    site = Site("ffn", 0, ("up", "down"))
    host = install(model, [site], rank=RANK, alpha=ALPHA, top_k=top_k, dtype=dtype)
    bank = host.banks["ffn"]
    for num in num_per_task:
        bank.freeze()
        bank.grow(num, generator=generator)
        bank.add_router(generator=generator)
        for stack in bank.stacks.values():
            if stack.fresh is not None:
                stack.fresh.B.data.uniform_(-1, 1, generator=generator)
    return model, bank, host.context


def states(batch: int = 2, tokens: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(seed))


def loop_reference(model: nn.Module, bank: ExpertBank, h_BTD: Tensor, gate_BTE: Tensor) -> Tensor:
    """The textbook: every expert on its own, one after another."""
    ffn, pairs = model["ffn"].frozen, [bank.expert(index) for index in range(gate_BTE.shape[-1])]

    def linear(key: str, x_BTI: Tensor) -> Tensor:
        y_BTO = getattr(ffn, key).frozen(x_BTI)
        for index, pair in enumerate(pairs):
            delta = (x_BTI @ pair[key].a_ERI[0].T) @ pair[key].b_EOR[0].T
            y_BTO = y_BTO + gate_BTE[..., index, None] * (ALPHA / RANK) * delta
        return y_BTO

    return linear("down", linear("up", h_BTD).relu())


@settings(max_examples=25, deadline=None)
@given(nums=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(lambda n: n[0] > 0), data=st.data())
def test_the_stacked_mixture_equals_a_loop_over_experts(nums: list[int], data: st.DataObject) -> None:
    task = data.draw(st.integers(0, len(nums) - 1))
    top_k, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99))
    model, bank, context = make(nums, top_k=top_k, seed=seed)
    plan, h_BTD = RoutePlan.single(task), states(seed=seed)
    with context.use(plan):
        y_BTD = model["ffn"](h_BTD)
    torch.testing.assert_close(y_BTD, loop_reference(model, bank, h_BTD, bank.routers(h_BTD, plan).gate_BTE))


def test_freezing_changes_outputs_by_rounding_only_and_old_tasks_not_at_all() -> None:
    model, bank, context = make([2, 2])
    h_BTD = states()

    def outputs() -> list[Tensor]:
        results = []
        for task in (0, 1):
            with context.use(RoutePlan.single(task)):
                results.append(model["ffn"](h_BTD))
        return results

    before = outputs()
    bank.freeze()
    after = outputs()
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])


def test_without_plan_or_experts_the_frozen_output_itself_comes_back() -> None:
    model, bank, context = make()
    h_BTD = states()
    up = model["ffn"].frozen.up
    expected, outputs = model["ffn"].frozen(h_BTD), []
    up.frozen.register_forward_hook(lambda *args: outputs.append(args[2]))
    for plan in (None, RoutePlan.single(-1), RoutePlan.single(7)):
        with context.use(plan):
            assert torch.equal(model["ffn"](h_BTD), expected)
            assert up(h_BTD) is outputs[-1]


def test_a_site_without_experts_at_that_time_serves_the_base_model_to_that_task_only() -> None:
    model, bank, context = make([0, 2])
    h_BTD = states()
    base = model["ffn"](h_BTD)
    with context.use(RoutePlan.single(0)):
        assert torch.equal(model["ffn"](h_BTD), base)
    with context.use(RoutePlan.hard(torch.tensor([0, 1]))):
        mixed = model["ffn"](h_BTD)
    assert torch.equal(mixed[0], base[0]) and not torch.allclose(mixed[1], base[1])


def test_a_task_without_a_router_is_named() -> None:
    model, _, context = make([2])
    with context.use(RoutePlan.single(1)), pytest.raises(ValueError, match="ffn: the route plan asks for task 1"):
        model["ffn"](states())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("experts", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_experts_keep_their_dtype_and_the_output_keeps_the_frozen_ones(
    frozen: torch.dtype, experts: torch.dtype, autocast: bool
) -> None:
    model, bank, context = make([2], dtype=experts)
    h_BTD = states()
    with context.use(RoutePlan.single(0)):
        exact = model["ffn"](h_BTD)
    model["ffn"].frozen.to(frozen)
    h_BTD = h_BTD.to(frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        base = model["ffn"](h_BTD)
        with context.use(RoutePlan.single(0)):
            y_BTD = model["ffn"](h_BTD)
    assert {stack.fresh.A.dtype for stack in bank.stacks.values()} == {experts}
    assert y_BTD.dtype == base.dtype == (torch.bfloat16 if autocast else frozen)
    assert (y_BTD - exact).norm() < 0.05 * exact.norm() < (base - exact).norm()


def test_new_experts_start_as_lora_does_and_change_nothing() -> None:
    model, bank, context = make([])
    bank.grow(64, generator=torch.Generator().manual_seed(0))
    bank.add_router(generator=torch.Generator())
    for stack in bank.stacks.values():
        bound = stack.d_in**-0.5
        peft_init = nn.init.kaiming_uniform_(torch.empty(64 * RANK, stack.d_in), a=5**0.5)
        assert 0.95 * bound < stack.fresh.A.abs().max() <= bound
        torch.testing.assert_close(stack.fresh.A.std(), peft_init.std(), rtol=0.1, atol=0)
        assert not stack.fresh.B.any()
    h_BTD = states()
    with context.use(RoutePlan.single(0)):
        assert torch.equal(model["ffn"](h_BTD), model["ffn"].frozen(h_BTD))


def test_a_grown_copy_computes_what_its_original_does_and_shares_no_memory() -> None:
    _, bank, _ = make([2, 1])
    bank.grow(2, generator=torch.Generator(), init_from=bank.expert(1))
    assert bank.num_experts == 5
    for key, original in bank.expert(1).items():
        for copy in (bank.expert(3)[key], bank.expert(-1)[key]):
            assert torch.equal(copy.a_ERI, original.a_ERI) and torch.equal(copy.b_EOR, original.b_EOR)
        bank.stacks[key].fresh.A.data.zero_()
        assert bank.stacks[key].frozen.A.any() and bank.expert(1)[key].a_ERI.any()


def test_noise_makes_copies_differ_from_each_other_by_as_much_as_was_asked() -> None:
    _, bank, _ = make([2])
    original = bank.expert(1)
    bank.grow(2, generator=torch.Generator().manual_seed(0), init_from=original, noise=0.1)
    for key, stack in bank.stacks.items():
        copies = stack.read(range(2, 4))
        for matrices, source in ((copies.a_ERI, original[key].a_ERI[0]), (copies.b_EOR, original[key].b_EOR[0])):
            assert not torch.equal(matrices[0], matrices[1])
            strength = (matrices - source).std() / source.std()
            assert 0.05 < float(strength) < 0.2


def test_dropping_probes_gives_back_the_bank_before() -> None:
    _, bank, _ = make([2, 1])
    bank.freeze()
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    bank.grow(1, generator=torch.Generator())
    bank.add_router(generator=torch.Generator())
    assert bank.num_experts == 4 and bank.routers.widths == [2, 3, 4]
    bank.drop_fresh()
    after = bank.state_dict()
    assert bank.num_experts == 3 and bank.routers.widths == [2, 3] and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_fresh_experts_and_the_newest_router_learn() -> None:
    model, bank, context = make([2, 1])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    experts = {f"ffn.experts.{key}.fresh.{matrix}" for key in ("up", "down") for matrix in "AB"}
    assert trainable == experts | {"ffn.routers.task_1"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    with context.use(RoutePlan.single(1)), context.observe() as seen:
        loss = model["ffn"](states()).square().mean() + 0.01 * seen.balance_loss()
    loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trainable


def test_the_gate_is_computed_once_per_forward_and_from_the_sites_input() -> None:
    model, bank, context = make([2])
    h_BTD, calls = states(), []
    bank.routers.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    with context.use(RoutePlan.single(0)):
        model["ffn"](h_BTD)
    assert len(calls) == 1 and calls[0] is h_BTD


def test_observed_counts_are_the_gates_slots_of_tokens_that_are_not_padding() -> None:
    model, bank, context = make([3])
    h_BTD, mask_BT = states(), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    plan = RoutePlan.single(0, mask_BT)
    with context.use(plan), context.observe() as seen:
        model["ffn"](h_BTD)
        model["ffn"](h_BTD)
    slots = bank.routers(h_BTD, plan).gate_BTE.gt(0)[mask_BT].sum(0)
    assert torch.equal(seen.counts["ffn"], 2 * slots) and seen.counts["ffn"].sum() == 2 * 8 * 2
    probability_E = torch.softmax(h_BTD[mask_BT] @ bank.routers.task_0.T, dim=-1).mean(0)
    torch.testing.assert_close(seen.balance_loss(), 3 * (slots / 16 * probability_E).sum())
    h_BTD[~mask_BT] += 100
    with context.use(plan), context.observe() as shifted:
        model["ffn"](h_BTD)
    assert torch.equal(shifted.counts["ffn"], slots)


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_the_work_is_as_many_operations_for_sixteen_experts_and_eight_samples_as_for_two() -> None:
    def ops(num_experts: int, batch: int) -> Counter[str]:
        model, bank, context = make([num_experts, 1])
        bank.freeze()
        with context.use(RoutePlan.hard(torch.arange(batch) % 2)), CountOps() as counting:
            model["ffn"](states(batch))
        return counting.ops

    assert ops(2, 2) == ops(16, 8)


@pytest.mark.parametrize("frozen", [False, True])
def test_one_block_of_experts_is_used_where_it_lies(frozen: bool) -> None:
    model, bank, context = make([4])
    if frozen:
        bank.freeze()
    with context.use(RoutePlan.single(0)), CountOps() as counting:
        model["ffn"](states())
    assert not {"aten.cat.default", "aten.clone.default", "aten.copy_.default"} & set(counting.ops)


def test_forward_never_waits_for_the_device() -> None:
    model, _, context = make([2, 1])
    plan = RoutePlan.hard(torch.tensor([0, 1]), torch.ones(2, 5, dtype=torch.bool))
    # Fake tensors have no values: reading one (.item(), a branch, nonzero) raises.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, context.use(plan), context.observe() as seen:
        y_BTD = model["ffn"](fake.from_tensor(states()))
        assert y_BTD.shape == (2, 5, D) and seen.balance_loss().shape == ()
