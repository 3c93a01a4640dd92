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
from typing import Literal

import torch
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.data import Subset
from transformers import PreTrainedModel

from llava_cmoe.data.batches import batches, share_of
from llava_cmoe.data.conversation import IGNORED, Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.bank import ExpertBank
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
    """How the new experts of a site begin.

    Attributes:
        copied: per linear, the expert they are copies of, or as many experts; None for a fresh LoRA init.
        mean_D: mean input of the site over the task's tokens, in the frozen model.
    """

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
    routers = host.routers(TaskRouters)
    for site, bank in host.banks.items():
        bank.grow(settings.max_new_experts, generator=generator)
        routers[site].add_task(bank.num_experts, bank.anchor.device, generator, copy=settings.router == "copied")
    probe_parameters = sum(ledger.trainable(bank).parameters for bank in host.banks.values())
    fit(
        Subset(data.samples, order[num_counted:].tolist()),
        training_context(settings.balance_weight),
        label="probing",
        epochs=1,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
    )
    rows, plan = Subset(data.samples, order[:num_counted].tolist()), RoutePlan.single(data.index)
    counts = count(model, rows, processor, host, plan, settings.counted)
    counts = {site: counts_E for site, counts_E in counts.items() if counts_E.any()}  # no picture: nothing to decide
    frequencies = {site: tuple((counts_E / counts_E.sum()).tolist()) for site, counts_E in counts.items()}
    thresholds = thresholds_of(frequencies, settings)
    chosen = chosen_of(frequencies, thresholds, settings, generator)
    origins = {site: source_expert(frequencies[site], settings) for site in chosen}
    means = mean_tokens(model, rows, processor, host)
    num_copied = settings.max_new_experts if settings.init == "probe" else 1
    starts = {
        site: ExpertInit(None if index is None else host.banks[site].expert(index, num_copied), means[site])
        for site, index in origins.items()
    }
    host.discard_trainable()
    growth = Growth(
        new_experts=dict.fromkeys(chosen, settings.max_new_experts),
        init_from={site: index for site, index in origins.items() if index is not None},
        frequencies=frequencies,
        thresholds=thresholds,
        probe_seconds=time.monotonic() - began,
        probe_parameters=probe_parameters,
    )
    return growth, starts


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

    def add(site: str, bank: ExpertBank, args: tuple[Tensor]) -> None:
        tokens_ND = args[0].flatten(0, -2) if bank.site.of_images else args[0][mask_BT]
        sums[site] += tokens_ND.double().sum(dim=0)
        num_tokens[site] += len(tokens_ND)

    hooks = [bank.register_forward_pre_hook(partial(add, site)) for site, bank in host.banks.items()]
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


def thresholds_of(frequencies: Mapping[str, Sequence[float]], settings: ProbeSettings) -> dict[str, float]:
    """tau_l = mean - alpha * std (Eq. 2), of one layer or over the layers, and at least the floor.

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
        case "all":
            return dict.fromkeys(frequencies, -1.0)  # below any frequency, also that of a probe no token used
        case "none":
            return dict.fromkeys(frequencies, 1.0)  # no frequency is above one


def expected_sites(settings: ProbeSettings, num_sites: int) -> int:
    """How many sites Eq. 2 makes likely to grow: those whose probe is used more than mean - alpha * std.

    Of uses that are normally distributed these are Phi(alpha), 60 % for alpha 0.25 and 84 % for 1, where three runs of
    the pocket sequence grew in 83 %. With `scope: layer` a probe is compared with its own layer's experts instead,
    and the share is a guess.
    """
    share = {"all": 1.0, "none": 0.0}.get(settings.scope, statistics.NormalDist().cdf(settings.alpha))
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


def source_expert(used: Sequence[float], settings: ProbeSettings) -> int | None:
    """Expert that new ones copy (Eq. 3: the most used of the pool), or the first probe; None for a fresh LoRA init."""
    pool = used[: -settings.max_new_experts]
    match settings.init:
        case "most_used":
            return pool.index(max(pool)) if pool else None
        case "probe":
            return len(pool)
        case "lora":
            return None
