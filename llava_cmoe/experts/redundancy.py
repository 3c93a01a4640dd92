"""What would be lost if one expert stood in for another, or none did: measured on tokens, with the gates they have.

One number holds both, use and likeness. Of what the experts add to a linear, leaving out e with stand-in s changes

    loss_es = sum_j g_je^2 |B_e A_e x_j - B_s A_s x_j|^2  /  sum_j |sum_e g_je B_e A_e x_j|^2

over the tokens j of a task: little if e is little used, or computes what s computes. With none, B_s A_s x_j is 0.
Whether a task can bear it is measured by whoever tries the merge.
Shape letters: J tokens, E experts, I and O input and output width of a linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llava_cmoe.experts.bank import StackedExperts
from llava_cmoe.experts.stand_ins import StandIns
from llava_cmoe.experts.surgery import ExpertHost


@dataclass(frozen=True)
class Step:
    """One expert less: `stand_in` (-1: none) for `expert` of a site, at a loss summed over tasks, mean over linears."""

    loss: float
    site: str
    expert: int
    stand_in: int


class Redundancy:
    """Adds up both sums of `loss_es`, for every task and linear, over the forward passes that run inside `watch`."""

    def __init__(self, host: ExpertHost) -> None:
        """Nothing seen yet."""
        self._host = host
        self._changed: dict[tuple[int, str, str], Tensor] = {}
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

    def losses(self) -> dict[str, Tensor]:
        """Site to `loss_es`, summed over tasks, mean over linears: (E, E + 1), the last column for none."""
        found: dict[str, Tensor] = {}
        for site, bank in self._host.banks.items():
            found[site] = torch.zeros(bank.num_experts, bank.num_experts + 1, dtype=torch.float64)
        for (task, site, linear), changed_EN in self._changed.items():
            num_known, loss_EN = len(changed_EN), found[site]
            mean_EN = (changed_EN / self._added[task, site, linear]).cpu() / len(self._host.banks[site].stacks)
            loss_EN[:num_known, :num_known] += mean_EN[:, :-1]
            loss_EN[:num_known, -1] += mean_EN[:, -1]
        return found

    def steps(self) -> Iterator[Step]:
        """Experts to leave out, the least lost first; of each site one stays, and no stand-in is left out itself."""
        losses = self.losses()
        possible = [
            Step(float(loss_EN[expert, stand_in]), site, expert, stand_in)
            for site, loss_EN in losses.items()
            for expert in range(len(loss_EN))
            for stand_in in (*range(expert), -1)
        ]
        left_out: dict[str, set[int]] = {site: set() for site in losses}
        standing_in: dict[str, set[int]] = {site: set() for site in losses}
        for step in sorted(possible, key=lambda step: step.loss):
            gone, busy = left_out[step.site], standing_in[step.site]
            one_stays = len(gone) + 1 < len(losses[step.site])
            if one_stays and step.expert not in gone | busy and step.stand_in not in gone:
                gone.add(step.expert)
                busy |= {step.stand_in} - {-1}
                yield step

    def _see(self, site: str, linear: str, stack: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        assert isinstance(stack, StackedExperts)
        of_images = self._host.banks[site].site.of_images
        plan = self._host.context.plan_on(args[0].device)
        assert plan is not None and plan.mask_BT is not None, "watched passes need a plan with a mask"
        x_JI, gate_JE = (value.flatten(0, 1) if of_images else value[plan.mask_BT] for value in args)
        out_JEO = _outputs(stack, x_JI, gate_JE.shape[-1])
        added = torch.einsum("jeo,je->jo", out_JEO, gate_JE).double().square().sum()
        for sums, value in ((self._changed, _changes(out_JEO, gate_JE)), (self._added, added)):
            key = plan.newest, site, linear
            sums[key] = sums[key] + value if key in sums else value


def stand_ins_of(steps: Sequence[Step], host: ExpertHost) -> Mapping[str, StandIns]:
    """The merge that some steps make, by site; sites without experts are absent."""
    of_E = {site: list(range(bank.num_experts)) for site, bank in host.banks.items() if bank.num_experts}
    for step in steps:
        of_E[step.site][step.expert] = step.stand_in
    return {site: StandIns(tuple(stand_ins)) for site, stand_ins in of_E.items()}


def _outputs(stack: StackedExperts, x_JI: Tensor, num_experts: int) -> Tensor:
    """What each of the first experts makes of each token, ungated: (J, E, O)."""
    (block,) = stack.blocks
    a_ERI, b_ERO = block.A[:num_experts], block.B[:num_experts]
    return torch.einsum("ji,eri,ero->jeo", x_JI.to(a_ERI.dtype), a_ERI, b_ERO)


def _changes(out_JEO: Tensor, gate_JE: Tensor) -> Tensor:
    """sum_j g_je^2 |o_je - o_js|^2 for each expert e and stand-in s, and in the last column for none: (E, E + 1)."""
    out_JEO, weight_JE = out_JEO.double(), gate_JE.double().square()
    norm_JE = out_JEO.square().sum(dim=-1)
    dots_EE = torch.einsum("je,jeo,jso->es", weight_JE, out_JEO, out_JEO)
    none_E1 = (weight_JE * norm_JE).sum(dim=0).unsqueeze(1)
    return torch.cat([none_E1 - 2 * dots_EE + weight_JE.mT @ norm_JE, none_E1], dim=1).clamp(min=0)
