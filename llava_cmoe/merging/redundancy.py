"""What joining two experts of a site into one, or dropping one, would change: measured on tokens, with their gates.

Let e be left out and s, its stand-in, become the mean with the shares w and 1 - w. Of what the experts add to a linear
this changes, over the tokens j of all tasks (o_je = B_e A_e x_j, ungated),

    sum_j |g_je o_je + g_js o_js - (g_je + g_js) (w o_je + (1 - w) o_js)|^2  =  (1-w)^2 P_es - 2 w (1-w) Q_es + w^2 P_se
    P_es = sum_j g_je^2 |o_je - o_js|^2        Q_es = sum_j g_je g_js |o_je - o_js|^2

which is least, (P_es P_se - Q_es^2) / (P_es + P_se + 2 Q_es), at w = (P_es + Q_es) / (P_es + P_se + 2 Q_es): little if
both compute the same, if one is little used, or if tokens that use both use them alike. Without a stand-in the change
is sum_j g_je^2 |o_je|^2. Every task counts relative to what its experts add in all, sum_j |sum_e g_je o_je|^2.

The sums leave aside that the mean has the rank of one expert. Whether tasks can bear it is measured by whoever merges.
Shape letters: J tokens, E experts, I and O input and output width of a linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llava_cmoe.experts.stack import StackedExperts
from llava_cmoe.experts.surgery import ExpertHost
from llava_cmoe.merging.merge_map import MergeMap

EPSILON = 1e-6
"""Least share of a stand-in in its mean: an expert that takes all of it leaves the ratio of the two finite."""

TOKENS = 1024
"""Tokens whose outputs are held at a time: 2 GB for 16 experts in an FFN of LLaMA 7B."""


@dataclass(frozen=True)
class Step:
    """One expert less: `expert` of a site goes into `stand_in` (-1: none) with a share of their mean.

    `loss` is what that changes, relative, summed over tasks, mean over linears.
    """

    loss: float
    site: str
    expert: int
    stand_in: int
    share: float


@dataclass(frozen=True)
class Sums:
    """The three sums over tokens: P and Q, (E, E), and that of dropping, (E,)."""

    p_EE: Tensor
    q_EE: Tensor
    none_E: Tensor

    def __add__(self, other: Sums) -> Sums:
        """Over the tokens of both."""
        return Sums(self.p_EE + other.p_EE, self.q_EE + other.q_EE, self.none_E + other.none_E)

    def __truediv__(self, number: Tensor | float) -> Sums:
        """Relative to a number."""
        return Sums(self.p_EE / number, self.q_EE / number, self.none_E / number)

    def share_EE(self) -> Tensor:
        """The share w of expert e (row) in its mean with s (column); 0 where the two never differ."""
        whole_EE = self.p_EE + self.p_EE.mT + 2 * self.q_EE
        return torch.where(whole_EE > 0, (self.p_EE + self.q_EE) / whole_EE, 0.0)

    def loss_EE(self) -> Tensor:
        """What joining e (row) and s (column) changes."""
        w_EE = self.share_EE()
        loss_EE = (1 - w_EE) ** 2 * self.p_EE - 2 * w_EE * (1 - w_EE) * self.q_EE + w_EE**2 * self.p_EE.mT
        return loss_EE.clamp(min=0)


class Redundancy:
    """Adds up the sums of every task and linear over the forward passes that run inside `watch`."""

    def __init__(self, host: ExpertHost) -> None:
        """Nothing seen yet."""
        self._host = host
        self._sums: dict[tuple[int, str, str], Sums] = {}
        self._added: dict[tuple[int, str, str], Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch forward passes, each under a plan of one task and with a mask, of whole prompts and answers."""
        hooks = [
            stack.register_forward_pre_hook(partial(self._see, site, linear))
            for site, bank in self._host.banks.items()
            for linear, stack in bank.stacks.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def relative(self) -> dict[str, Sums]:
        """Site to its sums, relative per task, summed over tasks, mean over linears."""
        found: dict[str, Sums] = {}
        for (task, site, linear), sums in self._sums.items():
            mean = sums / (self._added[task, site, linear] * len(self._host.banks[site].stacks))
            found[site] = found[site] + mean if site in found else mean
        return found

    def steps(self) -> Iterator[Step]:
        """Experts to leave out, the least lost first; of each site one stays, and no stand-in is left out itself."""
        possible, num_experts = list[Step](), dict[str, int]()
        for site, sums in self.relative().items():
            losses, shares, none = sums.loss_EE().tolist(), sums.share_EE().tolist(), sums.none_E.tolist()
            num_experts[site] = len(none)
            for expert in range(len(none)):
                possible.append(Step(none[expert], site, expert, -1, 0.0))
                possible += [Step(losses[expert][s], site, expert, s, shares[expert][s]) for s in range(expert)]
        left_out: dict[str, set[int]] = {site: set() for site in num_experts}
        standing_in: dict[str, set[int]] = {site: set() for site in num_experts}
        for step in sorted(possible, key=lambda step: step.loss):
            gone, busy = left_out[step.site], standing_in[step.site]
            one_stays = len(gone) + 1 < num_experts[step.site]
            if one_stays and step.expert not in gone | busy and step.stand_in not in gone:
                gone.add(step.expert)
                busy |= {step.stand_in} - {-1}
                yield step

    def _see(
        self, site: str, linear: str, stack: nn.Module, args: tuple[Tensor, Tensor, Sequence[int] | None, Tensor | None]
    ) -> None:
        assert isinstance(stack, StackedExperts)
        of_images = self._host.banks[site].site.of_images
        running = self._host.context.forward_pass(args[0].device)
        assert running is not None and running.mask_BT is not None, "watched passes need a plan and a batch with a mask"
        x_BTI, some_BTE, ids, _ = args
        gate_BTE = some_BTE.new_zeros(*some_BTE.shape[:2], self._host.banks[site].num_experts)
        gate_BTE[..., list(range(some_BTE.shape[-1]) if ids is None else ids)] = some_BTE
        x_JI, gate_JE = (value.flatten(0, 1) if of_images else value[running.mask_BT] for value in (x_BTI, gate_BTE))
        for some_x_JI, some_gate_JE in zip(torch.split(x_JI, TOKENS), torch.split(gate_JE, TOKENS), strict=True):
            self._add((running.plan.max_task, site, linear), _outputs(stack, some_x_JI), some_gate_JE)

    def _add(self, key: tuple[int, str, str], out_JEO: Tensor, gate_JE: Tensor) -> None:
        added = torch.einsum("jeo,je->jo", out_JEO, gate_JE).double().square().sum().cpu()
        sums = _sums(out_JEO, gate_JE)
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        self._added[key] = self._added[key] + added if key in self._added else added


def merge_map_of(steps: Sequence[Step], host: ExpertHost) -> Mapping[str, MergeMap]:
    """The merge that some steps make, by site; sites without experts are absent."""
    of_E = {site: list(range(bank.num_experts)) for site, bank in host.banks.items() if bank.num_experts}
    part_E = {site: [1.0] * len(stand_ins) for site, stand_ins in of_E.items()}
    for step in steps:
        of_E[step.site][step.expert] = step.stand_in
        # To the stand-in's own part of one as the share is to the rest; several may have the same stand-in.
        part_E[step.site][step.expert] = step.share / max(1 - step.share, EPSILON)
    return {site: MergeMap(tuple(of_E[site]), _shares(of_E[site], part_E[site])) for site in of_E}


def _shares(of_E: Sequence[int], part_E: Sequence[float]) -> tuple[float, ...]:
    whole = [sum(part for part, other in zip(part_E, of_E, strict=True) if other == stand_in) for stand_in in of_E]
    return tuple(
        0.0 if stand_in < 0 else part / total for part, total, stand_in in zip(part_E, whole, of_E, strict=True)
    )


def _outputs(stack: StackedExperts, x_JI: Tensor) -> Tensor:
    """What each expert makes of each token, ungated: (J, E, O)."""
    (block,) = stack.blocks
    return torch.einsum("ji,eri,ero->jeo", x_JI.to(block.A.dtype), block.A, block.B)


def _sums(out_JEO: Tensor, gate_JE: Tensor) -> Sums:
    out_JEO, gate_JE = out_JEO.double(), gate_JE.double()
    dot_JEE = torch.einsum("jeo,jso->jes", out_JEO, out_JEO)
    norm_JE = dot_JEE.diagonal(dim1=1, dim2=2)
    distance_JEE = (norm_JE.unsqueeze(1) + norm_JE.unsqueeze(2) - 2 * dot_JEE).clamp(min=0)
    return Sums(
        p_EE=torch.einsum("je,jes->es", gate_JE.square(), distance_JEE).cpu(),
        q_EE=torch.einsum("je,js,jes->es", gate_JE, gate_JE, distance_JEE).cpu(),
        none_E=(gate_JE.square() * norm_JE).sum(dim=0).cpu(),
    )
