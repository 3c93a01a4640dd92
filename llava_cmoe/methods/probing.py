"""Probe-guided knowledge extension (PGKE), first half: which layers does a new task need experts in?

Temporary experts and a temporary router are put beside the frozen pool and learn a small part of the task; a layer
whose probe is used more than its threshold gets new experts. The probes are gone when `probe` returns. Adding the
experts and training them is `cmoe.py`'s.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import PreTrainedModel

from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.stack import LoraPair
from llava_cmoe.experts.surgery import ExpertHost
from llava_cmoe.methods.base import FitFn, StageData, TrainingContext
from llava_cmoe.methods.pool_use import count, losses_by_task, mean_tokens
from llava_cmoe.records import Growth
from llava_cmoe.settings.methods.cmoe import ProbeSettings


@dataclass(frozen=True)
class ExpertInit:
    """How the new experts of a site begin, if it grows, and what its new router starts from.

    Attributes:
        copies_of: the experts that they copy, one or as many as are new; none for a fresh LoRA init.
        copied: these, per linear; None for a fresh LoRA init.
        known: the old experts that the new router may choose, ascending.
        mean_D: mean input of the site over the task's tokens, in the frozen model.
    """

    copies_of: tuple[int, ...]
    copied: Mapping[str, LoraPair] | None
    known: tuple[int, ...]
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
        known = routers[site].rows(like) if settings.router == "copied" else {}
        start = partial(with_rows, ids=bank.ids, rows=known)
        routers[site].add_task(bank.ids, bank.anchor.device, generator, start)
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
    used = counts
    if nearest is not None:
        used = count(model, rows, processor, host, RoutePlan.single(nearest), settings.counted)
    pools = {site: counts_E[: -settings.max_new_experts] for site, counts_E in used.items()}
    places = {site: copied_places(pools[site].tolist(), settings, nearest) for site in chosen}
    means = mean_tokens(model, rows, processor, host)
    init = {
        site: ExpertInit(
            copies_of=places.get(site, ()),
            copied=host.banks[site].expert(*places[site]) if places.get(site) else None,
            known=tuple(sorted(most_used(pools[site].tolist())[: settings.old_experts])),
            mean_D=means[site],
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


def nearest_task(losses: Sequence[float]) -> tuple[int, float]:
    """The learned task whose routers lose least, and the need: what it leaves of the frozen model's loss, at most 1."""
    frozen, *learned = losses
    best = min(range(len(learned)), key=learned.__getitem__)
    return best, min(1.0, learned[best] / frozen)


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
    match settings.init:
        case "most_used":
            return tuple(most_used(pool)[:1])
        case "nearest_task":
            used = [expert for expert in most_used(pool) if pool[expert]]
            return () if nearest is None or len(used) < num_new else tuple(used[:num_new])
        case "probe":
            return tuple(range(num_old, num_old + num_new))
        case "lora":
            return ()


def most_used(slots: Sequence[int]) -> list[int]:
    """Experts by the slots that they got, the most first; among equals the oldest."""
    return sorted(range(len(slots)), key=lambda expert: (-slots[expert], expert))


def with_rows(drawn_ED: Tensor, ids: Sequence[int], rows: Mapping[int, Tensor]) -> Tensor:
    """A router over some experts that starts with another one's rows, by expert, where that one has any."""
    return torch.stack([rows.get(expert, row_D).to(row_D) for expert, row_D in zip(ids, drawn_ED, strict=True)])


def with_head_start(drawn_ED: Tensor, num_new: int, mean_D: Tensor, logit: float) -> Tensor:
    """A router that starts in favour of the last `num_new` experts, by a logit at the task's mean token."""
    rows_ED = drawn_ED.clone()
    rows_ED[len(rows_ED) - num_new :] += _towards(mean_D, logit)
    return rows_ED


def as_nearest(
    drawn_ED: Tensor,
    ids: Sequence[int],
    nearest: Mapping[int, Tensor],
    copies_of: Sequence[int],
    mean_D: Tensor,
    logit: float,
) -> Tensor:
    """A router that starts as the nearest task's: copies have the rows, and so the gate, of the experts they copy.

    These, and experts that the nearest task did not know, start behind by a logit at the task's mean token. The copies
    are the last of `ids`.
    """
    copies = dict(zip(ids[len(ids) - len(copies_of) :], copies_of, strict=True))
    rows = {one: row_D for one, row_D in nearest.items() if one not in copies_of}
    rows |= {copy: nearest[one] for copy, one in copies.items() if one in nearest}
    return with_rows(drawn_ED - _towards(mean_D, logit), ids, rows)


def _towards(mean_D: Tensor, logit: float) -> Tensor:
    return (logit * mean_D / mean_D.square().sum()).cpu()
