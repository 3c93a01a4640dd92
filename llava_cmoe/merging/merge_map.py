"""Which expert stands in for which at one site: a merge, as a value; no router changes.

A token still chooses among all experts. What it gives to one that was left out goes to its stand-in, which becomes the
mean of all that it stands in for, itself among them. A choice of two of them becomes one expert with the sum of both
gates: exactly what it was where the gates are to each other as the shares in the mean. Which merge is a good one is
`redundancy.py`'s.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeMap:
    """A stand-in per expert of a site.

    Attributes:
        of_E: per expert its own index where it stays, the index of an older one that stays, or -1: it is dropped.
            Older ones only: a task then never computes an expert that its router did not know.
        share_E: per expert its share in the mean that its stand-in becomes; 0 where it is dropped.
    """

    of_E: tuple[int, ...]
    share_E: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError where an expert that stands in does not stay itself, or is newer."""
        for expert, stand_in in enumerate(self.of_E):
            if not -1 <= stand_in <= expert or (stand_in >= 0 and self.of_E[stand_in] != stand_in):
                raise ValueError(f"expert {expert}: {stand_in} cannot stand in for it; name an older one that stays")

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Experts that stay, oldest first."""
        return tuple(expert for expert, stand_in in enumerate(self.of_E) if expert == stand_in)

    def mean_of(self, expert: int) -> dict[int, float]:
        """The experts that have a share in a kept one, itself included, with the share of each."""
        shares = zip(self.of_E, self.share_E, strict=True)
        return {other: share for other, (stand_in, share) in enumerate(shares) if stand_in == expert and share}

    def gate_of(self, gate_BTE: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """The gate over kept experts, (B, T, S), from that over E; S are all that stay and are no newer than these.

        `ids` are the experts of the gate's columns, the first E where they are not named.
        """
        ids = range(gate_BTE.shape[-1]) if ids is None else ids
        num_kept = bisect_left(self.kept, ids[-1] + 1) if ids else 0
        return gate_BTE @ _share_ES(self, gate_BTE.device)[list(ids), :num_kept]


@cache
def _share_ES(stand_ins: MergeMap, device: torch.device) -> Tensor:
    """One where column s stands in for row e; made once per device, as each layer asks for it at each decoding step."""
    return (torch.tensor(stand_ins.of_E).unsqueeze(1) == torch.tensor(stand_ins.kept)).float().to(device)
