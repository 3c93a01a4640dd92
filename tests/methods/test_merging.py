"""Merging: what each rule makes of the tasks' products, and that this and nothing else answers."""

from collections.abc import Callable

import pytest
import torch
from formulas import through
from hypothesis import given
from hypothesis import strategies as st
from tiny import Lesson
from torch import Tensor

from llava_cmoe.experts.stack import LoraPair
from llava_cmoe.methods.merging import magmax, merged, ties
from llava_cmoe.settings.methods.merging import MergingSettings

SITE = "model.language_model.layers.1.self_attn.v_proj"
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


def drawn(sizes: tuple[int, int, int, int], seed: int) -> list[LoraPair]:
    tasks, rank, d_in, d_out = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, rank, d_in), (1, d_out, rank)
    return [LoraPair(*(torch.randn(shape, generator=generator) for shape in shapes)) for _ in range(tasks)]


def product(pair: LoraPair) -> Tensor:
    """Sum of the experts' B A (O, I) in float64."""
    return (pair.b_EOR.double() @ pair.a_ERI.double()).sum(dim=0)


@given(sizes=SIZES, seed=st.integers(0, 99))
def test_sum_and_mean_are_exact(sizes: tuple[int, int, int, int], seed: int):
    adapters = drawn(sizes, seed)
    total_OI = torch.stack([product(pair) for pair in adapters]).sum(dim=0)
    for rule, factor in (("arithmetic", 0.4), ("average", 1 / len(adapters))):
        found = merged(adapters, MergingSettings(rule=rule))
        assert len(found.a_ERI) == len(found.b_EOR) == len(adapters)
        torch.testing.assert_close(product(found), factor * total_OI, rtol=1e-5, atol=1e-6)


@given(sizes=SIZES, seed=st.integers(0, 99), rule=st.sampled_from(["ties", "magmax"]))
def test_the_others_are_approximated_as_well_as_their_rank_allows(
    sizes: tuple[int, int, int, int], seed: int, rule: str
):
    adapters = drawn(sizes, seed)
    tau_EOI = torch.stack([product(pair) for pair in adapters])
    whole_OI = 0.55 * ties(tau_EOI, 0.2) if rule == "ties" else 0.5 * magmax(tau_EOI)
    found = merged(adapters, MergingSettings(rule=rule))
    left_out_F = torch.linalg.svdvals(whole_OI)[len(adapters) * adapters[0].a_ERI.shape[1] :]
    error = (product(found) - whole_OI).norm()
    assert error == pytest.approx(float(left_out_F.norm()), rel=1e-3, abs=1e-5)


@given(sizes=SIZES, seed=st.integers(0, 99), kept=st.floats(0.05, 1))
def test_ties_trims_elects_and_averages_entry_by_entry(sizes: tuple[int, int, int, int], seed: int, kept: float):
    tau_EOI = torch.stack([product(pair) for pair in drawn(sizes, seed)])
    num = max(1, round(kept * tau_EOI[0].numel()))
    trimmed = []
    for tau_OI in tau_EOI:
        least = tau_OI.abs().flatten().sort(descending=True).values[num - 1]
        trimmed.append(torch.where(tau_OI.abs() >= least, tau_OI, 0))
    wanted_OI = torch.zeros_like(tau_EOI[0])
    for place in torch.cartesian_prod(*(torch.arange(size) for size in wanted_OI.shape)).view(-1, 2).tolist():
        values = [float(tau_OI[tuple(place)]) for tau_OI in trimmed]
        sign = 1 if sum(values) > 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        wanted_OI[tuple(place)] = sum(agreeing) / len(agreeing) if agreeing and sum(values) else 0
    torch.testing.assert_close(ties(tau_EOI, kept), wanted_OI)


@given(sizes=SIZES, seed=st.integers(0, 99))
def test_magmax_takes_the_largest_of_each_entry(sizes: tuple[int, int, int, int], seed: int):
    tau_EOI = torch.stack([product(pair) for pair in drawn(sizes, seed)])
    found_OI = magmax(tau_EOI)
    assert torch.equal(found_OI.abs(), tau_EOI.abs().amax(dim=0)) and (found_OI == tau_EOI).any(dim=0).all()


@pytest.mark.parametrize("rule", ["average", "magmax"])
def test_what_is_merged_answers(lesson_of: Callable[..., Lesson], rule: str):
    lesson = lesson_of("merging", f"method.rule={rule}")
    method, batch = lesson.run.method, lesson.prompts()
    stored = [lesson.run.registry.load(task)["experts"] for task in (0, 1)]
    pairs = [LoraPair(one[f"{SITE}/linear.A"], one[f"{SITE}/linear.B"]) for one in stored]
    bank = method.host.banks[SITE]
    with torch.no_grad(), through(bank) as calls, method.answering(batch):
        method.model(**batch)
    ((x_BTI, y_BTO),) = calls
    delta_OI = product(merged(pairs, MergingSettings(rule=rule)))
    expected_BTO = x_BTI @ (bank.frozen.frozen.weight.double() + 8 / 4 * delta_OI).T
    torch.testing.assert_close(y_BTO, expected_BTO, rtol=0, atol=1e-5)


def test_magmax_goes_on_from_the_last_task_and_the_others_begin_afresh(lesson_of: Callable[..., Lesson]):
    name = f"{SITE}/linear.A"
    for rule in ("magmax", "ties"):
        first, second = (
            lesson_of("merging", f"method.rule={rule}").run.registry.load(task)["experts"][name] for task in (0, 1)
        )
        moved, size = (second - first).norm(), first.norm()
        assert (moved < size / 2) == (rule == "magmax")
