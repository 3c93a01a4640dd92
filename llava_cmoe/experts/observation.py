"""What banks saw while somebody observed: slots per expert and router probabilities, and the balance loss of them.

Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor


class Observation:
    """What banks saw while it was open, summed over forward passes; tensors stay on the device until they are read.

    Reading the balance loss ends it: with gradient checkpointing, what runs in backward was seen before.

    Attributes:
        counts: site name to the number of top-k slots of non-pad tokens that each expert got (int64, width E).
        ids: site name to the experts that these are, as the gate names them.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.counts: dict[str, Tensor] = {}
        self.ids: dict[str, Sequence[int]] = {}
        self._probability: dict[str, Tensor] = {}
        self._ended = False

    def add(self, site: str, counts_E: Tensor, probability_E: Tensor, ids: Sequence[int] | None = None) -> None:
        """Called by banks: slot counts and summed softmax probabilities of one forward pass over one site."""
        if self._ended:
            return
        ids = range(len(counts_E)) if ids is None else ids
        if site not in self.counts:
            self.ids[site], self.counts[site], self._probability[site] = ids, counts_E, probability_E
        elif self.ids[site] == ids:
            self.counts[site] = self.counts[site] + counts_E
            self._probability[site] = self._probability[site] + probability_E
        else:
            raise ValueError(
                f"{site}: observed experts {_named(ids)} after {_named(self.ids[site])}; "
                "observe plans of different tasks separately"
            )

    def balance_loss(self) -> Tensor:
        """Mean over sites of n * sum_e F_e P_e (Switch Transformer, arXiv 2101.03961, Eq. 4): 1 where use is uniform.

        F is the share of top-k slots an expert got, P its mean softmax probability, both over the non-pad tokens that
        all processes saw in this forward pass, so that several are one. Differentiable through this process's part of
        P; it is scaled for gradients that are averaged over processes. Costs one small sum over processes.

        Raises:
            ValueError: no bank with experts ran under a plan while this observation was open.
        """
        if not self.counts:
            raise ValueError("balance loss of nothing: run the model inside context.use(plan) and context.observe()")
        self._ended = True
        terms = []
        for probability_E, (counts_E, num_tokens) in zip(self._probability.values(), self._of_all(), strict=True):
            share_E = counts_E / counts_E.sum().clamp(min=1)
            total = num_tokens.clamp(min=torch.finfo(torch.float32).tiny)
            terms.append(len(counts_E) * (share_E * probability_E / total).sum())
        return torch.stack(terms).mean() * int(PartialState().num_processes)

    def _of_all(self) -> list[tuple[Tensor, Tensor]]:
        """Slot counts (E,) and number of tokens per site, summed over all processes; float32 holds 2^24 slots exactly.

        A token's probabilities sum to 1, so their total is the number of tokens: no second count to keep.
        """
        own = [
            torch.cat([counts_E.float(), self._probability[site].detach().sum(dim=0, keepdim=True)])
            for site, counts_E in self.counts.items()
        ]
        summed = reduce(torch.cat(own), "sum").split([len(part) for part in own])
        return [(part[:-1], part[-1]) for part in summed]


def _named(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "none"
