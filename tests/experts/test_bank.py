from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from banks import CountOps, GivenGate, Parts, add_task, train_task, trainable_names
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_cmoe.backbones.sites import Site
from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.context import ForwardPass, RouteContext
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.base import Gate
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.surgery import install
from llava_cmoe.records import Located

RANK, ALPHA, D, INNER = 3, 6.0, 16, 20


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, INNER), nn.Linear(INNER, D, bias=False)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.down(self.up(h_BTD).relu())


def make(
    num_per_task: list[int] = (), dtype: torch.dtype = torch.float32, top_k: int = 2, seed: int = 0
) -> tuple[Parts, ExpertBank, RouteContext]:
    """A model that is one FFN, its bank with experts that do something, its context."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Parts(ffn=Ffn())
    site = Site("ffn", 0, ("up", "down"))
    host = install(model, [site], lambda width: TaskRouters(width, top_k), rank=RANK, alpha=ALPHA, dtype=dtype)
    bank = host.banks["ffn"]
    for num in num_per_task:
        bank.freeze()
        train_task(bank, num, generator, bound=1)
    return model, bank, host.context


def states(batch: int = 2, tokens: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(seed))


def hard(*tasks: int) -> RoutePlan:
    return RoutePlan.of(Located.at(torch.tensor(tasks)))


def gate_of(bank: ExpertBank, h_BTD: Tensor, plan: RoutePlan) -> Tensor:
    return bank.router(h_BTD, ForwardPass(plan)).gate_BTE


def loop_reference(model: Parts, bank: ExpertBank, h_BTD: Tensor, gate_BTE: Tensor) -> Tensor:
    """The textbook: every expert on its own, one after another."""
    ffn, pairs = model.ffn.frozen, [bank.expert(index) for index in range(gate_BTE.shape[-1])]

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
        y_BTD = model.ffn(h_BTD)
    torch.testing.assert_close(y_BTD, loop_reference(model, bank, h_BTD, gate_of(bank, h_BTD, plan)))


def test_freezing_changes_outputs_by_rounding_only_and_old_tasks_not_at_all() -> None:
    model, bank, context = make([2, 2])
    h_BTD = states()

    def outputs() -> list[Tensor]:
        results = []
        for task in (0, 1):
            with context.use(RoutePlan.single(task)):
                results.append(model.ffn(h_BTD))
        return results

    before = outputs()
    bank.freeze()
    after = outputs()
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])


def test_without_plan_or_experts_the_frozen_output_itself_comes_back() -> None:
    model, bank, context = make()
    h_BTD = states()
    up = model.ffn.frozen.up
    expected, outputs = model.ffn.frozen(h_BTD), []
    up.frozen.register_forward_hook(lambda *args: outputs.append(args[2]))
    for plan in (None, RoutePlan.single(-1), RoutePlan.single(7)):
        with context.use(plan):
            assert torch.equal(model.ffn(h_BTD), expected)
            assert up(h_BTD) is outputs[-1]


def test_a_site_without_experts_at_that_time_serves_the_base_model_to_that_task_only() -> None:
    model, bank, context = make([0, 2])
    h_BTD = states()
    base = model.ffn(h_BTD)
    with context.use(RoutePlan.single(0)):
        assert torch.equal(model.ffn(h_BTD), base)
    with context.use(hard(0, 1)):
        mixed = model.ffn(h_BTD)
    assert torch.equal(mixed[0], base[0]) and not torch.allclose(mixed[1], base[1])


def test_a_task_without_a_router_is_named() -> None:
    model, _, context = make([2])
    with (
        context.use(RoutePlan.single(1)),
        pytest.raises(ValueError, match="ffn: the route plan names task 1, but 1 tasks have"),
    ):
        model.ffn(states())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("experts", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_experts_keep_their_dtype_and_the_output_keeps_the_frozen_ones(
    frozen: torch.dtype, experts: torch.dtype, autocast: bool
) -> None:
    model, bank, context = make([2], dtype=experts)
    h_BTD = states()
    with context.use(RoutePlan.single(0)):
        exact = model.ffn(h_BTD)
    model.ffn.frozen.to(frozen)
    h_BTD = h_BTD.to(frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        base = model.ffn(h_BTD)
        with context.use(RoutePlan.single(0)):
            y_BTD = model.ffn(h_BTD)
    assert {stack.trainable.A.dtype for stack in bank.stacks.values()} == {experts}
    assert y_BTD.dtype == base.dtype == (torch.bfloat16 if autocast else frozen)
    assert (y_BTD - exact).norm() < 0.05 * exact.norm() < (base - exact).norm()


def test_new_experts_start_as_lora_does_and_change_nothing() -> None:
    model, bank, context = make([])
    add_task(bank, 64, torch.Generator().manual_seed(0))
    for stack in bank.stacks.values():
        bound = stack.d_in**-0.5
        peft_init = nn.init.kaiming_uniform_(torch.empty(64 * RANK, stack.d_in), a=5**0.5)
        assert 0.95 * bound < stack.trainable.A.abs().max() <= bound
        torch.testing.assert_close(stack.trainable.A.std(), peft_init.std(), rtol=0.1, atol=0)
        assert not stack.trainable.B.any()
    h_BTD = states()
    with context.use(RoutePlan.single(0)):
        assert torch.equal(model.ffn(h_BTD), model.ffn.frozen(h_BTD))


def test_a_grown_copy_computes_what_its_original_does_and_shares_no_memory() -> None:
    _, bank, _ = make([2, 1])
    bank.grow(2, generator=torch.Generator(), init_from=bank.expert(1))
    assert bank.num_experts == 5
    for key, original in bank.expert(1).items():
        for copy in (bank.expert(3)[key], bank.expert(-1)[key]):
            assert torch.equal(copy.a_ERI, original.a_ERI) and torch.equal(copy.b_EOR, original.b_EOR)
        bank.stacks[key].trainable.A.data.zero_()
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


def test_discarding_probes_gives_back_the_bank_before() -> None:
    _, bank, _ = make([2, 1])
    bank.freeze()
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    add_task(bank, 1, torch.Generator())
    assert bank.ids == (0, 1, 2, 3) and bank.trainable_ids == (3,) and [*map(len, bank.router.known)] == [2, 3, 4]
    bank.discard_trainable()
    after = bank.state_dict()
    assert bank.ids == (0, 1, 2) and bank.trainable_ids == () and [*map(len, bank.router.known)] == [2, 3]
    assert bank.num_experts == 3 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_new_experts_and_the_newest_router_learn() -> None:
    model, bank, context = make([2, 1])
    trainable = trainable_names(model)
    experts = {f"ffn.experts.{key}.trainable.{matrix}" for key in ("up", "down") for matrix in "AB"}
    assert trainable == experts | {"ffn.router.task_1"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    with context.use(RoutePlan.single(1)), context.observe() as seen:
        loss = model.ffn(states()).square().mean() + 0.01 * seen.balance_loss()
    loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trainable


def test_the_gate_is_computed_once_per_forward_and_from_the_sites_input() -> None:
    model, bank, context = make([2])
    h_BTD, calls = states(), []
    bank.router.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    with context.use(RoutePlan.single(0)):
        model.ffn(h_BTD)
    assert len(calls) == 1 and calls[0] is h_BTD


def test_observed_counts_are_the_gates_slots_of_tokens_that_are_not_padding() -> None:
    model, bank, context = make([3])
    h_BTD, mask_BT = states(), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    plan, batch = RoutePlan.single(0), {"attention_mask": mask_BT.long()}
    with context.use(plan, batch), context.observe() as seen:
        model.ffn(h_BTD)
        model.ffn(h_BTD)
    slots = gate_of(bank, h_BTD, plan).gt(0)[mask_BT].sum(0)
    assert torch.equal(seen.counts["ffn"], 2 * slots) and seen.counts["ffn"].sum() == 2 * 8 * 2
    probability_E = torch.softmax(h_BTD[mask_BT] @ bank.router.task_0.T, dim=-1).mean(0)
    torch.testing.assert_close(seen.balance_loss(), 3 * (slots / 16 * probability_E).sum())
    h_BTD[~mask_BT] += 100
    with context.use(plan, batch), context.observe() as shifted:
        model.ffn(h_BTD)
    assert torch.equal(shifted.counts["ffn"], slots)


def test_the_work_is_as_many_operations_for_sixteen_experts_and_eight_samples_as_for_two() -> None:
    def ops(num_experts: int, batch: int) -> Counter[str]:
        model, bank, context = make([num_experts, 1])
        bank.freeze()
        with context.use(hard(*(row % 2 for row in range(batch)))), CountOps() as counting:
            model.ffn(states(batch))
        return counting.ops

    assert ops(2, 2) == ops(16, 8)


@pytest.mark.parametrize("frozen", [False, True])
def test_one_block_of_experts_is_used_where_it_lies(frozen: bool) -> None:
    model, bank, context = make([4])
    if frozen:
        bank.freeze()
    with context.use(RoutePlan.single(0)), CountOps() as counting:
        model.ffn(states())
    assert not {"aten.cat.default", "aten.clone.default", "aten.copy_.default"} & set(counting.ops)


def test_forward_never_waits_for_the_device() -> None:
    model, _, context = make([2, 1])
    plan, batch = hard(0, 1), {"attention_mask": torch.ones(2, 5)}
    # Fake tensors have no values: reading one (.item(), a branch, nonzero) raises.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, context.use(plan, batch), context.observe() as seen:
        y_BTD = model.ffn(fake.from_tensor(states()))
        assert y_BTD.shape == (2, 5, D) and seen.balance_loss().shape == ()


# Experts by their ids, whatever the router: here it is told its gate.


def with_experts(ids: Sequence[int], seed: int = 0, trainable: bool = True) -> tuple[Parts, ExpertBank, RouteContext]:
    """An FFN in float64 whose bank has experts of these ids, all of which do something."""
    torch.manual_seed(seed)
    model = Parts(ffn=Ffn().double())
    site = Site("ffn", 0, ("up", "down"))
    host = install(model, [site], GivenGate, rank=RANK, alpha=ALPHA, dtype=torch.float64)
    bank = host.banks["ffn"]
    for expert in ids:
        bank.grow(1, generator=torch.Generator().manual_seed(100 * seed + expert), first=expert)
    for stack in bank.stacks.values():
        if stack.trainable is not None:
            stack.trainable.B.data.uniform_(-1, 1)
    if not trainable:
        bank.freeze()
    return model, bank, host.context


def computed(
    model: Parts, bank: ExpertBank, context: RouteContext, gate_BTE: Tensor, ids: Sequence[int] | None = None
) -> Tensor:
    assert isinstance(bank.router, GivenGate)
    bank.router.gate = Gate(gate_BTE, ids)
    with torch.no_grad(), context.use(RoutePlan.single(0)):
        y_BTD: Tensor = model.ffn(states().double())
    return y_BTD


def looped(model: Parts, bank: ExpertBank, gate_BTE: Tensor) -> Tensor:
    """One expert after another, each by its own id."""
    ffn, h_BTD = model.ffn.frozen, states().double()
    pairs = {expert: bank.expert(place) for place, expert in enumerate(bank.ids)}

    def linear(key: str, x_BTI: Tensor) -> Tensor:
        y_BTO = getattr(ffn, key).frozen(x_BTI)
        for expert, pair in pairs.items():
            if expert < gate_BTE.shape[-1]:
                delta_BTO = x_BTI @ pair[key].a_ERI[0].T @ pair[key].b_EOR[0].T
                y_BTO = y_BTO + gate_BTE[..., expert, None] * (ALPHA / RANK) * delta_BTO
        return y_BTO

    with torch.no_grad():
        return linear("down", linear("up", h_BTD).relu())


def gate(width: int, seed: int = 0) -> Tensor:
    return torch.rand(2, 5, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


some_ids = st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True)


@settings(max_examples=25)
@given(ids=some_ids, frozen=some_ids, width=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_site_with_any_ids_computes_what_a_loop_over_them_does(
    ids: list[int], frozen: list[int], width: int, seed: int
):
    model, bank, context = with_experts(ids, seed)
    bank.freeze(iter(frozen))
    assert bank.ids == tuple(sorted(ids)) and bank.trainable_ids == tuple(sorted({*ids} - {*frozen}))
    gate_BTE = gate(width, seed)
    close(computed(model, bank, context, gate_BTE), looped(model, bank, gate_BTE))


@settings(max_examples=25)
@given(ids=some_ids, named=some_ids.map(sorted), seed=st.integers(0, 99))
def test_a_gate_over_some_experts_is_the_whole_gate_with_zeros_elsewhere(ids: list[int], named: list[int], seed: int):
    model, bank, context = with_experts(ids, seed)
    whole_BTE = torch.zeros(2, 5, 16, dtype=torch.float64)
    whole_BTE[..., named] = gate(len(named), seed)
    of_some = computed(model, bank, context, gate(len(named), seed), named)
    close(of_some, computed(model, bank, context, whole_BTE))
    close(of_some, looped(model, bank, whole_BTE))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("gone", [(0,), (2,), (5,), (0, 2), (2, 7)])
def test_an_expert_keeps_its_id_and_what_it_adds_when_others_are_dropped(gone: tuple[int, ...], trainable: bool):
    model, bank, context = with_experts((0, 2, 5, 6), trainable=trainable)
    gate_BTE = gate(8)
    without_BTE = gate_BTE.clone()
    without_BTE[..., list(gone)] = 0
    matrices = {expert: bank.expert(place) for place, expert in enumerate(bank.ids)}
    expected = computed(model, bank, context, without_BTE)
    bank.drop(iter(gone))
    assert bank.ids == tuple(expert for expert in matrices if expert not in gone)
    assert bank.trainable_ids == (bank.ids if trainable else ()) and bank.num_experts == len(bank.ids)
    close(computed(model, bank, context, gate_BTE), expected)  # the column without an expert adds nothing
    for place, expert in enumerate(bank.ids):
        for key, pair in bank.expert(place).items():
            assert torch.equal(pair.a_ERI, matrices[expert][key].a_ERI)
            assert torch.equal(pair.b_EOR, matrices[expert][key].b_EOR)


def test_columns_without_an_expert_leave_the_frozen_output_itself():
    model, bank, context = with_experts((1, 3))
    with torch.no_grad():
        base = model.ffn.frozen(states().double())
    for named in ((0,), (2,), (0, 2), range(4, 9)):
        assert torch.equal(computed(model, bank, context, gate(len(named)), named), base)
    bank.drop([1, 3])
    assert torch.equal(computed(model, bank, context, gate(5)), base) and bank.ids == ()
    bank.router.gate = None
    with context.use(RoutePlan.single(0)):
        assert torch.equal(model.ffn(states().double()), base)


def test_freezing_some_experts_of_a_site_freezes_them_on_every_linear_and_changes_no_output():
    model, bank, context = with_experts((1, 3, 4))
    before = computed(model, bank, context, gate(6))
    bank.freeze(expert for expert in (3, 8))
    assert (bank.ids, bank.trainable_ids) == ((1, 3, 4), (1, 4))
    assert all(stack.frozen.ids == (3,) and stack.trainable.ids == (1, 4) for stack in bank.stacks.values())
    close(computed(model, bank, context, gate(6)), before)
    bank.discard_trainable()
    assert (bank.ids, bank.trainable_ids) == ((3,), ())
    only_BTE = torch.zeros(2, 5, 6, dtype=torch.float64)
    only_BTE[..., 3] = gate(6)[..., 3]
    close(computed(model, bank, context, gate(6)), looped(model, bank, only_BTE))


def test_new_experts_follow_the_newest_or_begin_where_they_are_told_and_no_id_is_given_twice():
    _, bank, _ = with_experts((2,), trainable=False)
    bank.grow(2, generator=torch.Generator())
    bank.grow(1, generator=torch.Generator(), first=0)
    assert bank.ids == (0, 2, 3, 4) and bank.trainable_ids == (0, 3, 4)
    with pytest.raises(ValueError, match=r"experts \[2, 3\] are there already"):
        bank.grow(3, generator=torch.Generator(), first=1)
    assert bank.ids == (0, 2, 3, 4)


@pytest.mark.parametrize("shape", [(2, 1), (1, 1), (1, 5)])
def test_a_gate_that_tokens_or_samples_share_is_one_for_each_of_them(shape: tuple[int, int]):
    model, bank, context = with_experts((0, 1, 3))
    shared_BTE = gate(4)[: shape[0], : shape[1]]
    close(computed(model, bank, context, shared_BTE), computed(model, bank, context, shared_BTE.expand(2, 5, 4)))
