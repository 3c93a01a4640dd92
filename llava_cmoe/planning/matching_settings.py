"""Which rank, experts and layers train a wanted mean of parameters per task, such as the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.settings.methods.cmoe import CmoeSettings

PAPER_MEAN = 43_960_000
"""Mean of the parameters that LLaVA-CMoE trains per task of CoIN (arXiv 2503.21227)."""
RANKS = (4, 8, 16, 32, 64, 128)
"""Ranks that are tried."""
TOLERANCE = 0.02
"""A setting whose mean differs by more than this share is not named: one layer more or less is about as much."""


@dataclass(frozen=True)
class MeanSetting:
    """Settings, and the mean over a sequence of the parameters that a task then trains (experts and routers).

    Attributes:
        rank: of an expert.
        num_first: experts per site of the first task.
        num_new: experts that a later task adds to a site that grows.
        sites: how many sites grow for a later task.
        mean: parameters.
    """

    rank: int
    num_first: int
    num_new: int
    sites: int
    mean: float


def settings_for(
    wanted: float, banks: Mapping[str, ExpertBank], settings: CmoeSettings, num_tasks: int
) -> tuple[MeanSetting, ...]:
    """For each rank and number of new experts the number of sites that comes closest, where it comes close."""
    closest = (
        min(_means(banks, rank, settings.experts.num_first, num_new, num_tasks), key=lambda one: abs(one.mean - wanted))
        for rank in RANKS
        for num_new in (1, 2)
    )
    return tuple(one for one in closest if abs(one.mean - wanted) <= TOLERANCE * wanted)


def _means(
    banks: Mapping[str, ExpertBank], rank: int, num_first: int, num_new: int, num_tasks: int
) -> Iterator[MeanSetting]:
    """The mean for any number of sites; where sites differ in size, of sites as large as their mean.

    A task's router at a site has a row for every expert there so far, so routers make up a sum over tasks of sums.
    """
    expert = rank * sum(_per_rank(bank) for bank in banks.values()) / len(banks)
    row = sum(bank.routers.hidden_size for bank in banks.values()) / len(banks)
    later = num_tasks - 1
    for sites in range(len(banks) + 1):
        experts = num_first * len(banks) + later * num_new * sites
        rows = num_tasks * num_first * len(banks) + num_new * sites * later * (later + 1) / 2
        yield MeanSetting(rank, num_first, num_new, sites, (experts * expert + rows * row) / num_tasks)


def _per_rank(bank: ExpertBank) -> int:
    return sum(stack.d_in + stack.d_out for stack in bank.stacks.values())
