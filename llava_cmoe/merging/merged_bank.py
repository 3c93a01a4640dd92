"""A bank that answers with fewer experts: those that stay are means, and a router's gate goes to them.

Nothing is learned in a merged bank; `unmerge` gives back the very blocks and router it had.
Shape letters: B batch, T tokens, D hidden, E experts, S experts that stay, R rank, I and O width of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.routers.base import Gate, Router
from llava_cmoe.experts.stack import ExpertBlock
from llava_cmoe.merging.merge_map import MergeMap


@dataclass(frozen=True)
class Whole:
    """What a bank was before it was merged."""

    router: Router
    blocks: Mapping[str, ExpertBlock]


class MergedRouter(Router):
    """Another router's gate, given to the experts that stay; its choices, and what is counted of them, stay too."""

    def __init__(self, router: Router, stand_ins: MergeMap) -> None:
        """Wrap a router."""
        super().__init__()
        self.router, self.stand_ins = router, stand_ins

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """The gate over the experts that stay, (B, T, S)."""
        gate: Gate | None = self.router(h_BTD, forward_pass)
        if gate is None:
            return None
        return gate._replace(gate_BTE=self.stand_ins.gate_of(gate.gate_BTE, gate.ids), ids=None, slots_BTC=None)

    def state_of(self, task: int) -> dict[str, Tensor]:
        """The wrapped router's: a merge changes nothing that was learned."""
        return self.router.state_of(task)

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Nothing is added to a merged bank."""
        raise ValueError("a merged bank only answers; learning goes on in one that is not merged")

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Nothing is added to a merged bank."""
        raise ValueError("a merged bank only answers; learning goes on in one that is not merged")

    def discard_trainable(self) -> None:
        """Nothing of a merged bank is trainable."""


def merge(bank: ExpertBank, stand_ins: MergeMap) -> Whole:
    """Leave out experts that others stand in for; returns what the bank was, for `unmerge`. It then only answers.

    Raises:
        ValueError: the stand-ins are those of another number of experts, or some experts are still learning or are
            not numbered from 0 on. Nothing has changed then.
    """
    if len(stand_ins.of_E) != bank.num_experts:
        raise ValueError(
            f"{bank.site.name}: stand-ins for {len(stand_ins.of_E)} experts, the site has {bank.num_experts}; "
            "merge a run as it was when the merge was found"
        )
    if bank.trainable_ids or bank.ids != tuple(range(bank.num_experts)):
        raise ValueError(
            f"{bank.site.name}: only frozen experts that are numbered from 0 on can be merged; the site has the ids "
            f"{bank.ids}, of which {bank.trainable_ids} are still learning"
        )
    blocks = {}
    for key, stack in bank.stacks.items():
        assert stack.frozen is not None, "a merge map is of some experts"
        blocks[key] = stack.frozen
        stack.frozen = _kept(stack.frozen, stand_ins)
    whole = Whole(bank.router, blocks)
    bank.router = MergedRouter(bank.router, stand_ins)
    return whole


def unmerge(bank: ExpertBank, whole: Whole) -> None:
    """Give a bank back all of its experts."""
    bank.router = whole.router
    for key, stack in bank.stacks.items():
        stack.frozen = whole.blocks[key]


def _kept(block: ExpertBlock, stand_ins: MergeMap) -> ExpertBlock:
    """Only the experts that stay, each as the mean of those it stands in for, numbered anew as the gate is."""
    means = [_mean(block, stand_ins.mean_of(expert)) for expert in stand_ins.kept]
    a_SRI, b_SRO = (torch.stack(matrices) for matrices in zip(*means, strict=True))
    return ExpertBlock(range(len(means)), a_SRI, b_SRO, trainable=False)


@torch.no_grad()
def _mean(block: ExpertBlock, shares: Mapping[int, float]) -> tuple[Tensor, Tensor]:
    """The expert A (R, I), B (R, O) closest to sum_e share_e B_e A_e; the very expert where it is the only one.

    The sum has the rank of all experts together. Its best approximation of rank R (Eckart, Young 1936) comes from the
    small matrix between two orthonormal bases, so nothing as large as the linear is made.
    """
    if len(shares) == 1:
        (expert,) = shares
        return block.A[expert], block.B[expert]
    experts, rank = list(shares), block.A.shape[1]
    share_E11 = torch.tensor(list(shares.values()), device=block.A.device).view(-1, 1, 1)
    basis_IF, a_FF = torch.linalg.qr(block.A[experts].float().flatten(0, 1).mT)
    basis_OF, b_FF = torch.linalg.qr((share_E11 * block.B[experts].float()).flatten(0, 1).mT)
    left_FF, scale_F, right_FF = torch.linalg.svd(b_FF @ a_FF.mT)
    half_R = scale_F[:rank].sqrt()
    a_RI = (basis_IF @ right_FF.mT[:, :rank] * half_R).mT
    b_RO = (basis_OF @ left_FF[:, :rank] * half_R).mT
    return a_RI.to(block.A.dtype), b_RO.to(block.B.dtype)
