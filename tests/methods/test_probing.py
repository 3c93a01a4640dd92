"""Probes tell where a task needs experts, and leave nothing behind."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_cmoe.backbones.sites import ffn_sites
from llava_cmoe.data import batches
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.conversation import IGNORED
from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.surgery import ExpertHost, install
from llava_cmoe.methods import pool_use
from llava_cmoe.methods.base import ExtraLoss, StageData, TrainingContext, no_extra_loss
from llava_cmoe.methods.pool_use import count, losses_by_task, mean_tokens
from llava_cmoe.methods.probing import (
    as_nearest,
    chosen_of,
    copied_places,
    nearest_task,
    probe,
    probe_use,
    thresholds_of,
    with_head_start,
)
from llava_cmoe.settings.methods.cmoe import ProbeSettings

TOP_K = 2


class Rows(Dataset[dict[str, Tensor]]):
    """Text-only samples of 3 to 12 tokens, the second half of each an answer."""

    def __init__(self, num: int) -> None:
        generator = torch.Generator().manual_seed(1)
        lengths = (3 + torch.arange(num) % 10).tolist()
        self.rows = [torch.randint(4, 300, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_T = self.rows[index]
        labels_T = ids_T.clone()
        labels_T[: len(ids_T) // 2] = IGNORED
        return {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T), "labels": labels_T}

    def learned(self) -> list[int]:
        """Answer tokens per row."""
        return [len(ids_T) - len(ids_T) // 2 for ids_T in self.rows]


@pytest.fixture
def host(tiny_llava: LlavaForConditionalGeneration) -> ExpertHost:
    """A pool of three experts per layer that do something, learned by one task and frozen."""
    generator = torch.Generator().manual_seed(0)
    host = install(tiny_llava, ffn_sites(tiny_llava), lambda width: TaskRouters(width, TOP_K), rank=3, alpha=6.0)
    for site, bank in host.banks.items():
        bank.grow(3, generator=generator)
        host.routers(TaskRouters)[site].add_task(bank.ids, bank.anchor.device, generator)
        for stack in bank.stacks.values():
            stack.trainable.B.data.uniform_(-0.5, 0.5, generator=generator)
    host.freeze()
    return host


def run_probe(
    model: LlavaForConditionalGeneration,
    host: ExpertHost,
    processor: LlavaProcessor,
    fits: list[dict[str, Any]],
    **settings: Any,
) -> tuple[Any, Any]:
    """Probe task 1 on twenty rows; a fit only moves what it may move, and is written down."""

    @contextmanager
    def training_context(batch: Batch) -> Iterator[ExtraLoss]:
        yield no_extra_loss

    def fit(samples: Any, training_context: TrainingContext, **kwargs: Any) -> None:
        moved = {name: value for name, value in model.named_parameters() if value.requires_grad}
        fits.append({"num_samples": len(samples), "moved": moved, **kwargs})
        generator = torch.Generator().manual_seed(3)
        for value in moved.values():
            value.data.add_(0.3 * torch.randn(value.shape, generator=generator))

    data = StageData(index=1, name="second", samples=Rows(20), prompts=None, seed=5)
    given = ProbeSettings(**{"fraction": 0.5, "holdout": 0.5, **settings})
    return probe(model, host, data, processor, given, lambda weight: training_context, fit)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        # (0.2, 0.2, 0.6) and (0.5, 0.3, 0.2): means 1/3, mean squares 0.44/3 and 0.38/3, so variances 8/225 and 14/900
        ("layer", {"a": 1 / 3 - 0.5 * math.sqrt(8 / 225), "b": 1 / 3 - 0.5 * math.sqrt(14 / 900)}),
        # the probes alone, 0.6 and 0.2: mean 0.4, std 0.2
        ("global", {"a": 0.4 - 0.5 * 0.2, "b": 0.4 - 0.5 * 0.2}),
    ],
)
def test_the_threshold_is_mean_minus_alpha_std(scope: str, expected: dict[str, float]):
    frequencies = {"a": (0.2, 0.2, 0.6), "b": (0.5, 0.3, 0.2)}
    settings = ProbeSettings(alpha=0.5, scope=scope, floor=0)
    assert thresholds_of(frequencies, settings) == pytest.approx(expected, abs=1e-12)


POOLS = st.lists(
    st.lists(st.floats(0, 1), min_size=2, max_size=12).filter(lambda used: sum(used) > 0), min_size=1, max_size=8
)
"""Use of the experts of some layers, of pools of different size; not normalised yet."""


def shares(pools: list[list[float]]) -> dict[str, tuple[float, ...]]:
    return {f"layer {index}": tuple(one / sum(used) for one in used) for index, used in enumerate(pools)}


@given(POOLS, st.sampled_from(["layer", "global", "random"]), st.floats(0, 4))
def test_no_layer_grows_whose_probe_is_used_less_than_chance(pools: list[list[float]], scope: str, alpha: float):
    frequencies, settings = shares(pools), ProbeSettings(scope=scope, alpha=alpha, floor=1)
    thresholds = thresholds_of(frequencies, settings)
    for site, used in frequencies.items():
        assert thresholds[site] >= (1 - 1e-9) / len(used)
    if scope != "random":
        chosen = chosen_of(frequencies, thresholds, settings, torch.Generator())
        assert all(frequencies[site][-1] * len(frequencies[site]) > 1 - 1e-9 for site in chosen)


@given(POOLS, st.sampled_from(["layer", "global"]), st.floats(0, 4))
def test_no_layer_grows_whose_probe_no_token_used(pools: list[list[float]], scope: str, alpha: float):
    frequencies = shares([*pools, [1.0, 0.0], [0.0, 1.0]])
    settings = ProbeSettings(scope=scope, alpha=alpha)
    chosen = chosen_of(frequencies, thresholds_of(frequencies, settings), settings, torch.Generator())
    assert all(frequencies[site][-1] > 0 for site in chosen)


@given(st.lists(st.tuples(st.integers(2, 30), st.floats(0, 1.9)), min_size=2, max_size=8), st.floats(0, 2))
def test_layers_are_compared_by_use_in_units_of_chance_whatever_the_size_of_their_pools(
    layers: list[tuple[int, float]], alpha: float
):
    def grown(sizes: list[int]) -> list[str]:
        frequencies = {
            f"layer {index}": (*[(1 - times / size) / (size - 1)] * (size - 1), times / size)
            for index, (size, (_, times)) in enumerate(zip(sizes, layers, strict=True))
        }
        settings = ProbeSettings(scope="global", alpha=alpha, floor=1)
        return chosen_of(frequencies, thresholds_of(frequencies, settings), settings, torch.Generator())

    margins = {round(times, 9) for _, times in layers} | {1.0}
    assume(len(margins) == len(layers) + 1 and min(abs(a - b) for a in margins for b in margins if a != b) > 1e-3)
    mean = sum(times for _, times in layers) / len(layers)
    spread = math.sqrt(sum((times - mean) ** 2 for _, times in layers) / len(layers))
    assume(all(abs(times - max(mean - alpha * spread, 1)) > 1e-6 for _, times in layers))
    assert grown([size for size, _ in layers]) == grown([2] * len(layers)) == grown([30] * len(layers))


def test_one_layer_that_stands_out_lets_none_grow_that_no_token_uses():
    frequencies = {f"layer {index}": (1.0, 0.0) for index in range(5)} | {"layer 5": (0.2, 0.8)}
    for floor in (0.0, 1.0):  # in units of chance: mean 0.27, std 0.6, so mean - std lies below zero
        settings = ProbeSettings(scope="global", alpha=1, floor=floor)
        chosen = chosen_of(frequencies, thresholds_of(frequencies, settings), settings, torch.Generator())
        assert chosen == ["layer 5"]


@pytest.mark.parametrize("router", ["copied", "random"])
def test_a_probe_router_starts_as_the_last_tasks_router_or_at_random(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, tiny_processor: LlavaProcessor, router: str
):
    before = {site: one.weight(0).detach().clone() for site, one in host.routers(TaskRouters).items()}
    seen: list[dict[str, Tensor]] = []
    for seed in (5, 6):
        found = starting_routers(tiny_llava, host, tiny_processor, seed, router=router)
        seen.append(found)
        for site, weight_ED in found.items():
            assert torch.equal(weight_ED[:3], before[site]) == (router == "copied")
    for site, weight_ED in seen[0].items():
        assert not torch.equal(weight_ED[3:], seen[1][site][3:])  # the probe's own row is drawn


def starting_routers(
    model: LlavaForConditionalGeneration, host: ExpertHost, processor: LlavaProcessor, seed: int, **settings: Any
) -> dict[str, Tensor]:
    """The probe routers as probing begins to train them."""
    found: dict[str, Tensor] = {}

    def fit(samples: Any, training_context: TrainingContext, **kwargs: Any) -> None:
        found.update({site: one.weight(1).detach().clone() for site, one in host.routers(TaskRouters).items()})

    data = StageData(index=1, name="second", samples=Rows(20), prompts=None, seed=seed)
    probe(model, host, data, processor, ProbeSettings(**settings), lambda weight: no_training_context, fit)
    return found


def no_training_context(batch: Batch) -> Any:
    raise AssertionError("nothing is trained")


@pytest.mark.parametrize(("scope", "grown"), [("all", 2), ("none", 0)])
def test_controls_grow_everywhere_or_nowhere_after_probing_as_ever(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, tiny_processor: LlavaProcessor, scope: str, grown: int
):
    fits: list[dict[str, Any]] = []
    growth, _ = run_probe(tiny_llava, host, tiny_processor, fits, scope=scope)
    assert len(growth.new_experts) == grown and len(growth.frequencies) == 2 and len(fits) == 1


@pytest.mark.parametrize("use", [0.0, 1.0])
def test_controls_do_not_depend_on_the_probes(use: float):
    for scope, passes in (("all", True), ("none", False)):
        thresholds = thresholds_of({"a": (1 - use, use)}, ProbeSettings(scope=scope))
        assert (use > thresholds["a"]) == passes


def test_the_random_control_grows_as_many_layers_as_the_probes_choose_wherever_these_are():
    frequencies = {f"layer {index}": (1 - index / 10, index / 10) for index in range(8)}

    def chosen(scope: str, seed: int) -> list[str]:
        settings = ProbeSettings(alpha=0.5, scope=scope, floor=0)
        thresholds = thresholds_of(frequencies, settings)
        return chosen_of(frequencies, thresholds, settings, torch.Generator().manual_seed(seed))

    probed = chosen("global", 0)
    drawn = [chosen("random", seed) for seed in range(100)]
    assert probed == ["layer 3", "layer 4", "layer 5", "layer 6", "layer 7"] == chosen("global", 1)
    assert {len(sites) for sites in drawn} == {5} and drawn == [chosen("random", seed) for seed in range(100)]
    assert all(sites == sorted(sites) for sites in drawn)  # in the model's order, as experts are initialised in turn
    for site in frequencies:  # 62.5 of 100 expected, std 4.8
        assert 43 <= sum(site in sites for sites in drawn) <= 82


def test_several_probes_of_a_layer_are_judged_by_their_mean():
    assert probe_use((0.5, 0.1, 0.4), ProbeSettings(max_new_experts=2)) == pytest.approx(0.25)
    assert probe_use((0.5, 0.1, 0.4), ProbeSettings()) == 0.4


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(1, 3), st.sampled_from([None, 0, 3]))
def test_new_experts_copy_what_the_settings_say(pool: list[int], num_new: int, nearest: int | None):
    def places(init: str) -> tuple[int, ...]:
        return copied_places(pool, ProbeSettings(init=init, max_new_experts=num_new), nearest)

    assert places("lora") == ()
    assert places("probe") == tuple(range(len(pool), len(pool) + num_new))
    assert places("most_used") == ((pool.index(max(pool)),) if pool else ())
    near = places("nearest_task")
    if nearest is None or sum(map(bool, pool)) < num_new:
        assert near == ()
    else:  # as many different ones as are new, and no other is used more
        assert len(set(near)) == num_new and near[:1] == places("most_used")
        assert all(pool[place] <= min(pool[one] for one in near) for place in set(range(len(pool))) - set(near))


@given(st.integers(0, 9999), st.integers(2, 6), st.integers(0, 3), st.sampled_from([0, 2]))
def test_a_router_that_starts_as_the_nearest_tasks_mixes_what_that_one_mixed(
    seed: int, num_known: int, num_later: int, num_new: int
):
    generator = torch.Generator().manual_seed(seed)
    width, mean_D = 16, torch.randn(16, generator=generator)
    nearest_ED = torch.randn(num_known, width, generator=generator)
    drawn_ED = 0.1 * torch.randn(num_known + num_later + num_new, width, generator=generator)
    h_BTD = mean_D + 0.2 * torch.randn(3, 5, width, generator=generator)
    of_nearest = TaskRouters(width, TOP_K)
    of_nearest.add(nearest_ED)
    chosen = gate_of(of_nearest, h_BTD)
    places = tuple(chosen.sum(dim=(0, 1)).argsort(descending=True)[:num_new].tolist())
    started = TaskRouters(width, TOP_K)
    started.add(as_nearest(drawn_ED, range(len(drawn_ED)), of_nearest.rows(0), places, mean_D, logit=200.0))
    begun = gate_of(started, h_BTD)
    copies = begun[..., num_known + num_later :]
    kept = [place for place in range(num_known) if place not in places]
    torch.testing.assert_close(begun[..., kept], chosen[..., kept])  # what is not copied goes on as it is
    torch.testing.assert_close(copies, chosen[..., list(places)])  # a copy has the share of what it copies
    assert not begun[..., [*places, *range(num_known, num_known + num_later)]].any()


def gate_of(routers: TaskRouters, h_BTD: Tensor) -> Tensor:
    gate = routers(h_BTD, ForwardPass(RoutePlan.single(0)))
    assert gate is not None
    return gate.gate_BTE


def test_a_head_start_is_on_top_of_the_rows_of_new_experts_alone():
    drawn_ED, mean_D = torch.randn(5, 8), torch.randn(8)
    led_ED = with_head_start(drawn_ED, 2, mean_D, logit=6.0)
    assert torch.equal(led_ED[:3], drawn_ED[:3])
    torch.testing.assert_close((led_ED - drawn_ED)[3:] @ mean_D, torch.full((2,), 6.0))


def test_losses_are_of_the_frozen_model_and_under_each_learned_tasks_routers(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, tiny_processor: LlavaProcessor
):
    generator, routers = torch.Generator().manual_seed(8), host.routers(TaskRouters)
    for site, bank in host.banks.items():
        for _ in range(2):
            bank.grow(1, generator=generator)
            for stack in bank.stacks.values():
                stack.trainable.B.data.uniform_(-0.5, 0.5, generator=generator)
            routers[site].add_task(bank.ids, bank.anchor.device, generator)
            bank.freeze()
    rows = Subset(Rows(6), range(6))
    losses = []
    for task in (None, 0, 1, 2):
        with host.context.use(None if task is None else RoutePlan.single(task)), torch.no_grad():
            losses.append(
                sum(
                    tiny_llava(**{name: value[None] for name, value in row.items()}, use_cache=False).loss.item()
                    * sum(row["labels"][1:] != IGNORED).item()
                    for row in rows
                )
            )
    assert losses_by_task(tiny_llava, rows, tiny_processor, host, 3) == pytest.approx(losses, rel=1e-5)


@given(st.lists(st.floats(0.1, 20), min_size=2, max_size=9))
def test_the_nearest_task_is_the_one_that_loses_least_and_leaves_a_need_of_at_most_one(losses: list[float]):
    nearest, need = nearest_task(losses)
    assert losses[1 + nearest] == min(losses[1:])
    assert need == pytest.approx(min(1, min(losses[1:]) / losses[0]))


@given(POOLS, st.floats(0, 1), st.floats(0.1, 1))
def test_as_large_a_share_of_the_layers_grows_as_is_needed_those_whose_probes_are_used_most(
    pools: list[list[float]], need: float, near: float
):
    frequencies, settings = shares(pools), ProbeSettings(scope="need", near=near)
    uses = {site: probe_use(used, settings) * len(used) for site, used in frequencies.items()}
    assume(len(set(uses.values())) == len(uses))  # of equal ones fewer grow
    chosen = chosen_of(frequencies, thresholds_of(frequencies, settings, need), settings, torch.Generator())
    assert len(chosen) == (math.ceil(need / near * len(uses)) if need < near else len(uses))
    assert all(uses[site] < min(uses[one] for one in chosen) for site in uses if chosen and site not in chosen)


def test_the_pool_is_what_it_was(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, tiny_processor: LlavaProcessor
):
    before = {name: value.clone() for name, value in tiny_llava.named_parameters()}
    fits: list[dict[str, Any]] = []
    run_probe(tiny_llava, host, tiny_processor, fits)
    after = dict(tiny_llava.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in after.values())
    assert all(len(bank.router) == 1 and bank.num_experts == 3 for bank in host.banks.values())


def test_only_probes_and_their_routers_are_trained_on_their_share_of_the_rows(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, tiny_processor: LlavaProcessor
):
    fits: list[dict[str, Any]] = []
    growth, _ = run_probe(tiny_llava, host, tiny_processor, fits, holdout=0.3, batch_size=2, learning_rate=0.1)
    (call,) = fits
    assert call["num_samples"] == 7  # half of twenty, less the three that are counted
    assert (call["epochs"], call["batch_size"], call["learning_rate"]) == (1, 2, 0.1)
    assert all(".trainable." in name or name.endswith(".router.task_1") for name in call["moved"])
    assert growth.probe_parameters == sum(value.numel() for value in call["moved"].values())


def test_a_layer_grows_where_its_probe_is_used_more_than_the_threshold(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, tiny_processor: LlavaProcessor
):
    growth, inits = run_probe(tiny_llava, host, tiny_processor, [], scope="global", floor=0)
    assert len(growth.new_experts) == 1  # of two layers, one lies above the mean of both
    for site, used in growth.frequencies.items():
        assert sum(used) == pytest.approx(1, abs=1e-6) and len(used) == 4
        assert (site in growth.new_experts) == (used[-1] > growth.thresholds[site])
    ((site, index),) = growth.init_from.items()
    assert index == max(range(3), key=growth.frequencies[site].__getitem__)
    for linear, pair in inits[site].copied.items():
        assert torch.equal(pair.a_ERI, host.banks[site].expert(index)[linear].a_ERI)


@pytest.mark.parametrize("num", [1, 2])
def test_probes_can_be_handed_on_as_the_new_experts(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, tiny_processor: LlavaProcessor, num: int
):
    fits: list[dict[str, Any]] = []
    growth, inits = run_probe(tiny_llava, host, tiny_processor, fits, scope="all", init="probe", max_new_experts=num)
    assert growth.init_from == dict.fromkeys(host.banks, 3) and growth.new_experts == dict.fromkeys(host.banks, num)
    for site, bank in host.banks.items():
        bank.grow(num, generator=torch.Generator(), init_from=inits[site].copied)
        for linear, stack in bank.stacks.items():
            for block, matrix in (("A", stack.trainable.A), ("B", stack.trainable.B)):
                assert torch.equal(matrix, fits[0]["moved"][f"{site}.experts.{linear}.trainable.{block}"])
                assert len(matrix.unique(dim=0)) == num


@pytest.mark.parametrize("batch_size", [1, 3])
def test_counts_depend_on_neither_batch_size_nor_padding(
    tiny_llava: LlavaForConditionalGeneration,
    host: ExpertHost,
    tiny_processor: LlavaProcessor,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
):
    rows, plan = Rows(10), RoutePlan.single(0)
    together = count(tiny_llava, rows, tiny_processor, host, plan)
    monkeypatch.setattr(pool_use, "COUNT_BATCH", batch_size)  # 1: nothing is padded
    apart = count(tiny_llava, rows, tiny_processor, host, plan)
    tokens = sum(len(row["input_ids"]) for row in map(rows.__getitem__, range(10)))
    for site, counts_E in together.items():
        assert counts_E.tolist() == apart[site].tolist()
        assert counts_E.sum() == TOP_K * tokens


def test_of_answers_only_their_own_tokens_are_counted(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, tiny_processor: LlavaProcessor
):
    rows, plan = Rows(10), RoutePlan.single(0)
    for ids_T, kept in zip(rows.rows, rows.learned(), strict=True):
        assert 0 < kept < len(ids_T)
    everything = count(tiny_llava, rows, tiny_processor, host, plan)
    answers = count(tiny_llava, rows, tiny_processor, host, plan, "answer")
    for site, counts_E in answers.items():
        assert counts_E.sum() == TOP_K * sum(rows.learned())
        assert bool((counts_E <= everything[site]).all())


@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_mean_token_of_a_site_is_the_frozen_models_and_knows_no_padding(
    tiny_llava: LlavaForConditionalGeneration,
    host: ExpertHost,
    tiny_processor: LlavaProcessor,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
):
    rows, seen = Rows(10), []
    site, bank = next(iter(host.banks.items()))
    hook = bank.register_forward_pre_hook(lambda bank, args: seen.append(args[0][0]))
    with torch.no_grad(), host.context.use(None):
        for row in map(rows.__getitem__, range(10)):
            tiny_llava(input_ids=row["input_ids"][None])
    hook.remove()
    monkeypatch.setattr(pool_use, "COUNT_BATCH", batch_size)
    with host.context.use(RoutePlan.single(0)):  # experts of an earlier task do not touch it
        means = mean_tokens(tiny_llava, rows, tiny_processor, host)
    torch.testing.assert_close(means[site], torch.cat(seen).mean(dim=0), rtol=1e-5, atol=1e-6)
    assert means.keys() == host.banks.keys()


def test_processes_share_the_counting_even_where_one_has_nothing_to_count(
    tiny_llava: LlavaForConditionalGeneration,
    host: ExpertHost,
    tiny_processor: LlavaProcessor,
    monkeypatch: pytest.MonkeyPatch,
):
    rows, plan = Rows(1), RoutePlan.single(0)
    whole = count(tiny_llava, rows, tiny_processor, host, plan)
    parts = []
    for process in range(2):
        state = SimpleNamespace(process_index=process, num_processes=2)
        monkeypatch.setattr(batches, "PartialState", lambda state=state: state)
        parts.append(count(tiny_llava, rows, tiny_processor, host, plan))
    assert list(parts[1]) == list(whole)  # a site left out here would leave the others waiting for its sum
    assert all(torch.equal(parts[0][site] + parts[1][site], whole[site]) for site in whole)
