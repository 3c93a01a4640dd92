"""Probe-guided knowledge extension (PGKE), first half: which layers does a new task need experts in?

Temporary experts and a temporary router are put beside the frozen pool and learn a small part of the task; a layer
whose probe is used more than its threshold gets new experts. The probes are gone when `probe` returns. Adding the
experts and training them is `cmoe.py`'s.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, Literal

import torch
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.data import Subset
from transformers import PreTrainedModel

from llava_cmoe.data.batches import batches, share_of
from llava_cmoe.data.conversation import IGNORED, Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.bank import ExpertBank, input_of
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.stack import LoraPair
from llava_cmoe.experts.surgery import ExpertHost
from llava_cmoe.methods.base import FitFn, StageData, TrainingContext
from llava_cmoe.records import Growth
from llava_cmoe.settings.methods.cmoe import ProbeSettings

COUNT_BATCH = 32
"""Samples per forward pass while counting; counts are sums, so it changes nothing but memory."""


@dataclass(frozen=True)
class ExpertInit:
    """How the new experts of a site begin, if it grows, and what its new router starts from.

    Attributes:
        places: of the experts that they copy, one or as many as are new; none for a fresh LoRA init.
        copied: these, per linear; None for a fresh LoRA init.
        mean_D: mean input of the site over the task's tokens, in the frozen model.
    """

    places: tuple[int, ...]
    copied: Mapping[str, LoraPair] | None
    mean_D: Tensor


def probe(
    model: PreTrainedModel,
    host: ExpertHost,
    data: StageData,
    processor: Processor,
    settings: ProbeSettings,
    training_context: Callable[[float], TrainingContext],
    fit: FitFn,
) -> tuple[Growth, Mapping[str, ExpertInit]]:
    """Find the sites that need experts for a task; the banks are afterwards what they were before.

    Args:
        model: the backbone that carries the banks.
        host: the frozen pool.
        data: the task.
        processor: the backbone's.
        settings: what share of the task is read, and how use becomes a decision.
        training_context: from the weight of the balance loss to the context of a training step.
        fit: trains whatever requires gradients, here probes and their routers.
    """
    began = time.monotonic()
    generator = torch.Generator().manual_seed(data.seed)
    order = torch.randperm(len(data.samples), generator=generator)[
        : max(2, round(len(data.samples) * settings.fraction))
    ]
    num_counted = max(1, round(len(order) * settings.holdout))
    rows, nearest, need = Subset(data.samples, order[:num_counted].tolist()), None, None
    if settings.init == "nearest_task" or settings.scope == "need":
        read = Subset(data.samples, order.tolist())
        found, need = nearest_task(losses_by_task(model, read, processor, host, data.index))
        nearest = found if settings.init == "nearest_task" and need <= settings.near else None
    routers = host.routers(TaskRouters)
    like = data.index - 1 if nearest is None else nearest
    for site, bank in host.banks.items():
        bank.grow(settings.max_new_experts, generator=generator)
        start = partial(with_rows, rows_ED=routers[site].weight(like)) if settings.router == "copied" else None
        routers[site].add_task(bank.num_experts, bank.anchor.device, generator, start)
    probe_parameters = sum(ledger.trainable(bank).parameters for bank in host.banks.values())
    fit(
        Subset(data.samples, order[num_counted:].tolist()),
        training_context(settings.balance_weight),
        label="probing",
        epochs=1,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
    )
    counts = count(model, rows, processor, host, RoutePlan.single(data.index), settings.counted)
    counts = {site: counts_E for site, counts_E in counts.items() if counts_E.any()}  # no picture: nothing to decide
    frequencies = {site: tuple((counts_E / counts_E.sum()).tolist()) for site, counts_E in counts.items()}
    thresholds = thresholds_of(frequencies, settings, need)
    chosen = chosen_of(frequencies, thresholds, settings, generator)
    pools = {site: counts_E[: -settings.max_new_experts] for site, counts_E in counts.items()}
    if nearest is not None:
        pools = count(model, rows, processor, host, RoutePlan.single(nearest), settings.counted)
    places = {site: copied_places(pools[site].tolist(), settings, nearest) for site in chosen}
    means = mean_tokens(model, rows, processor, host)
    init = {
        site: ExpertInit(
            places.get(site, ()), host.banks[site].expert(*places[site]) if places.get(site) else None, means[site]
        )
        for site in frequencies
    }
    host.discard_trainable()
    growth = Growth(
        new_experts=dict.fromkeys(chosen, settings.max_new_experts),
        init_from={site: copied[0] for site, copied in places.items() if copied},
        frequencies=frequencies,
        thresholds=thresholds,
        nearest=nearest,
        need=need,
        probe_seconds=time.monotonic() - began,
        probe_parameters=probe_parameters,
    )
    return growth, init


@torch.no_grad()
def losses_by_task(
    model: PreTrainedModel,
    samples: Subset[dict[str, Tensor]],
    processor: Processor,
    host: ExpertHost,
    num_tasks: int,
) -> tuple[float, ...]:
    """Loss of some rows' answers, summed over tokens: of the frozen model, then under each learned task's routers.

    Costs a forward pass over the rows for each; all processes get the same sums.
    """
    plans = [None, *map(RoutePlan.single, range(num_tasks))]
    losses = torch.zeros(len(plans), dtype=torch.float64, device=model.device)
    for inputs, labels_BT in _share(model, samples, processor):
        for place, plan in enumerate(plans):
            with host.context.use(plan, inputs):
                num_answered = (labels_BT[:, 1:] != IGNORED).sum()
                losses[place] += model(**inputs, labels=labels_BT, use_cache=False).loss * num_answered
    return tuple(reduce(losses, "sum").tolist())


def nearest_task(losses: Sequence[float]) -> tuple[int, float]:
    """The learned task whose routers lose least, and the need: what it leaves of the frozen model's loss, at most 1."""
    frozen, *learned = losses
    best = min(range(len(learned)), key=learned.__getitem__)
    return best, min(1.0, learned[best] / frozen)


@torch.no_grad()
def count(
    model: PreTrainedModel,
    samples: Subset[dict[str, Tensor]],
    processor: Processor,
    host: ExpertHost,
    plan: RoutePlan,
    counted: Literal["all", "answer"] = "all",
) -> dict[str, Tensor]:
    """Top-k slots of the counted tokens per site and expert over some rows, summed over all processes: (E,) each.

    f_le = counts_e / (k * tokens) follows, as every token fills k slots. All processes grow by the same sums. A site
    that reads images counts all patches, whichever tokens are counted in the LLM.
    """
    with host.context.observe() as seen:
        for inputs, labels_BT in _share(model, samples, processor):
            counted_BT = inputs["attention_mask"].bool() if counted == "all" else labels_BT != IGNORED
            with host.context.use(plan, {"attention_mask": counted_BT}):
                model.base_model(**inputs, use_cache=False)
    # Each process sums each site, also one that had no row to count: a sum waits for all of them.
    none = {
        site: torch.zeros(bank.num_experts, dtype=torch.long, device=model.device) for site, bank in host.banks.items()
    }
    return {site: reduce(counts_E, "sum") for site, counts_E in (none | seen.counts).items()}


@torch.no_grad()
def mean_tokens(
    model: PreTrainedModel, samples: Subset[dict[str, Tensor]], processor: Processor, host: ExpertHost
) -> dict[str, Tensor]:
    """Mean input of every site in the frozen model over some rows, over all processes: (D,).

    Over the non-pad tokens or, at a site that reads images, over all patches; NaN where the rows have no image.
    """
    sums = {
        site: torch.zeros(bank.hidden_size, dtype=torch.float64, device=model.device)
        for site, bank in host.banks.items()
    }
    num_tokens = dict.fromkeys(sums, 0)

    def add(site: str, bank: ExpertBank, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        h_BTD = input_of(args, named)
        tokens_ND = h_BTD.flatten(0, -2) if bank.site.of_images else h_BTD[mask_BT]
        sums[site] += tokens_ND.double().sum(dim=0)
        num_tokens[site] += len(tokens_ND)

    hooks = [bank.register_forward_pre_hook(partial(add, site), with_kwargs=True) for site, bank in host.banks.items()]
    try:
        for inputs, _ in _share(model, samples, processor):
            mask_BT = inputs["attention_mask"].bool()
            with host.context.use(None):
                model.base_model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    totals = {site: reduce(torch.tensor(num, device=model.device), "sum") for site, num in num_tokens.items()}
    return {site: (reduce(sum_D, "sum") / totals[site]).float() for site, sum_D in sums.items()}


def _share(
    model: PreTrainedModel, samples: Subset[dict[str, Tensor]], processor: Processor
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """This process's share of some rows in batches on the model's device: what the model reads, and the labels."""
    model.eval()  # type: ignore[no-untyped-call]
    for inputs in batches(share_of(samples), processor, COUNT_BATCH, model.device):
        labels_BT = inputs.pop("labels")
        yield inputs, labels_BT


def thresholds_of(
    frequencies: Mapping[str, Sequence[float]], settings: ProbeSettings, need: float | None = None
) -> dict[str, float]:
    """tau_l = mean - alpha * std (Eq. 2), of one layer or over the layers, and at least the floor.

    With `scope: need` it is what as many layers as are needed lie above: all of a task that nothing learned is near to.

    Frequencies of different layers are compared in units of chance, 1 / n of n experts. The standard deviation is that
    of the population: there is no larger set of experts that these were drawn from.
    """

    def threshold(values: Sequence[float]) -> float:
        """In units of chance, as the values are."""
        return max(statistics.fmean(values) - settings.alpha * statistics.pstdev(values), settings.floor)

    match settings.scope:
        case "layer":
            return {
                site: threshold([one * len(used) for one in used]) / len(used) for site, used in frequencies.items()
            }
        case "global" | "random":
            shared = threshold([probe_use(used, settings) * len(used) for used in frequencies.values()])
            return {site: shared / len(used) for site, used in frequencies.items()}
        case "need":
            assert need is not None, "measured before"
            uses = sorted((probe_use(used, settings) * len(used) for used in frequencies.values()), reverse=True)
            num_grown = ceil(min(1.0, need / settings.near) * len(uses))
            most = max(map(len, frequencies.values()), default=1)  # times chance: every slot of a site is the probes'
            # Halfway between the last that grows and the first that does not, so that no rounding turns either.
            shared = statistics.fmean([most, *uses, -1.0][num_grown : num_grown + 2])
            return {site: shared / len(used) for site, used in frequencies.items()}
        case "all":
            return dict.fromkeys(frequencies, -1.0)  # below any frequency, also that of a probe no token used
        case "none":
            return dict.fromkeys(frequencies, 1.0)  # no frequency is above one


def expected_sites(settings: ProbeSettings, num_sites: int) -> int:
    """How many sites Eq. 2 makes likely to grow: those whose probe is used more than mean - alpha * std.

    Of uses that are normally distributed these are Phi(alpha), 60 % for alpha 0.25 and 84 % for 1, where three runs of
    the pocket sequence grew in 83 %. With `scope: layer` a probe is compared with its own layer's experts instead,
    and the share is a guess, as with `scope: need`.
    """
    share = {"all": 1.0, "none": 0.0, "need": 0.5}.get(settings.scope, statistics.NormalDist().cdf(settings.alpha))
    return round(share * num_sites)


def chosen_of(
    frequencies: Mapping[str, Sequence[float]],
    thresholds: Mapping[str, float],
    settings: ProbeSettings,
    generator: torch.Generator,
) -> list[str]:
    """Sites that grow: those whose probe is used more than their threshold or, as a control, as many at random."""
    chosen = [site for site, used in frequencies.items() if probe_use(used, settings) > thresholds[site]]
    if settings.scope != "random":
        return chosen
    drawn = torch.randperm(len(frequencies), generator=generator)[: len(chosen)].tolist()
    return [site for index, site in enumerate(frequencies) if index in drawn]


def probe_use(used: Sequence[float], settings: ProbeSettings) -> float:
    """Mean frequency of a site's probes, which are its last experts."""
    return statistics.fmean(used[-settings.max_new_experts :])


def copied_places(pool: Sequence[int], settings: ProbeSettings, nearest: int | None) -> tuple[int, ...]:
    """Experts that a site's new ones copy, by place; none for a fresh LoRA init.

    The most used (Eq. 3), of the nearest task as many as are new, or the probes.

    Args:
        pool: slots of each old expert, under the probes' routers or, where a task is near, under its own.
        settings: how many are new, and how they begin.
        nearest: learned task that the new one begins as; None if none is near.
    """
    num_new, num_old = settings.max_new_experts, len(pool)
    most_used = sorted(range(num_old), key=lambda place: (-pool[place], place))
    match settings.init:
        case "most_used":
            return tuple(most_used[:1])
        case "nearest_task":
            return () if nearest is None or num_old < num_new else tuple(most_used[:num_new])
        case "probe":
            return tuple(range(num_old, num_old + num_new))
        case "lora":
            return ()


def with_rows(drawn_ED: Tensor, rows_ED: Tensor | None) -> Tensor:
    """A router that starts with another one's rows for the experts that this one knows."""
    known = 0 if rows_ED is None else len(rows_ED)
    return drawn_ED if rows_ED is None else torch.cat([rows_ED.detach().to(drawn_ED), drawn_ED[known:]])


def with_head_start(drawn_ED: Tensor, num_new: int, mean_D: Tensor, logit: float) -> Tensor:
    """A router that starts in favour of the last `num_new` experts, by a logit at the task's mean token."""
    rows_ED = drawn_ED.clone()
    rows_ED[len(rows_ED) - num_new :] += _towards(mean_D, logit)
    return rows_ED


def as_nearest(drawn_ED: Tensor, nearest_ED: Tensor, places: Sequence[int], mean_D: Tensor, logit: float) -> Tensor:
    """A router that starts as the nearest task's: copies have the rows, and so the gate, of the experts they copy.

    These, and experts that the nearest task did not know, start behind by a logit at the task's mean token.
    """
    rows_ED = drawn_ED - _towards(mean_D, logit)
    behind_ND = rows_ED[list(places)]
    rows_ED[: len(nearest_ED)] = nearest_ED.to(rows_ED)
    rows_ED[len(rows_ED) - len(places) :] = rows_ED[list(places)]
    rows_ED[list(places)] = behind_ND
    return rows_ED


def _towards(mean_D: Tensor, logit: float) -> Tensor:
    return (logit * mean_D / mean_D.square().sum()).cpu()
