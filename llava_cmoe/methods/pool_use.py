"""What the pool does for some rows of a task, read off forward passes: losses, experts used, mean tokens.

All are summed over processes, so that these decide alike. Nothing learns here; what follows is `probing.py`'s.
Shape letters: B batch, T tokens, D hidden, E experts, N tokens counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.data import Subset
from transformers import PreTrainedModel

from llava_cmoe.data.batches import batches, share_of
from llava_cmoe.data.conversation import IGNORED, Processor
from llava_cmoe.experts.bank import ExpertBank, input_of
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.surgery import ExpertHost

COUNT_BATCH = 32
"""Samples per forward pass while counting; counts are sums, so it changes nothing but memory."""


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


@torch.no_grad()
def count(
    model: PreTrainedModel,
    samples: Subset[dict[str, Tensor]],
    processor: Processor,
    host: ExpertHost,
    plan: RoutePlan,
    counted: Literal["all", "answer"] = "all",
) -> dict[str, Tensor]:
    """Top-k slots of the counted tokens per site and expert of it over some rows, over all processes: (E,) each.

    f_le = counts_e / (k * tokens) follows, as every token fills k slots. All processes grow by the same sums. A site
    that reads images counts all patches, whichever tokens are counted in the LLM.
    """
    with host.context.observe() as seen:
        for inputs, labels_BT in _share(model, samples, processor):
            counted_BT = inputs["attention_mask"].bool() if counted == "all" else labels_BT != IGNORED
            with host.context.use(plan, {"attention_mask": counted_BT}):
                model.base_model(**inputs, use_cache=False)
    # Each process sums each site, also one that had no row to count: a sum waits for all of them.
    totals = {}
    for site, bank in host.banks.items():
        total_E = torch.zeros(bank.num_experts, dtype=torch.long, device=model.device)
        if site in seen.counts:
            total_E[list(seen.ids[site])] = seen.counts[site]
        totals[site] = reduce(total_E, "sum")
    return totals


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
