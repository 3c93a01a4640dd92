"""The experts of one site: stacked LoRA experts, and their mixture on top of the frozen linears.

    h_BTD, input of the site (say, an FFN)
      |
      +---> routers, one per task; the plan says whose ---> gate_BTE, top-k weights of each token
      |                                                         |
      |     each linear of the site                             |  one gate for all of them
      +---> x_BTI ---------- W0, frozen, of any class ----------|------------------- + ---> y_BTO
              |                                                 v                    |
              +--- [A_1 .. A_E]: I -> E*R ----------------- times gate --- [B_1 .. B_E]: E*R -> O

    y_j = W0 x_j + sum_e gate_je * (alpha / rank) * B_e A_e x_j

What is different from the textbook: no loop over experts and no dispatch of tokens. A sum over experts is the inner sum
of a matrix product, so with the experts stacked along the concatenated rank E*R their mixture is two matrix products
with the gate in between. Every expert takes part on every process, so no collective waits for one that does not.

When the gate says what is `routers.py`; where banks sit in the model is `surgery.py`; what grows when is the method's.
Shape letters: B batch, T tokens, D hidden, E experts, R rank, I and O input and output width of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_cmoe.backbones.sites import Site
from llava_cmoe.experts.plan import RouteContext
from llava_cmoe.experts.routers import Gate, Routers, linear_init
from llava_cmoe.merging.merge_map import StandIns


@dataclass(frozen=True)
class LoraPair:
    """LoRA matrices of some experts on one linear, as LoRA shapes them: a (E, R, d_in) and b (E, d_out, R)."""

    a_ERI: Tensor
    b_EOR: Tensor

    def copies(self, num: int, noise: float, generator: torch.Generator) -> LoraPair:
        """One expert `num` times, or `num` experts, each matrix with Gaussian noise of `noise` times its own std."""

        def copied(matrix: Tensor) -> Tensor:
            copies = matrix.expand(num, -1, -1)
            if noise == 0:
                return copies
            drawn = torch.randn(copies.shape, generator=generator).to(matrix)  # on the CPU: the same on any device
            return copies + noise * matrix.std(dim=(1, 2), keepdim=True) * drawn

        return LoraPair(copied(self.a_ERI), copied(self.b_EOR))


def stack_name(path: str) -> str:
    """Name of a linear inside its bank and in stored tensors: its path in the site, `linear` where it is the site."""
    return path.replace(".", "_") or "linear"


class ExpertBlock(nn.Module):
    """Some experts on one linear, all of them frozen or all of them fresh: A (E, R, I) and B (E, R, O).

    B rests transposed, so that concatenating the ranks is a view. From (E, O, R) each forward would copy every expert:
    6 to 9 times a decoding step's time as measured on a CPU, and copies kept for backward.
    """

    def __init__(self, a_ERI: Tensor, b_ERO: Tensor, trainable: bool) -> None:
        """Take the tensors over as parameters."""
        super().__init__()
        self.num_experts = len(a_ERI)  # under ZeRO-3 a parameter at rest has no shape
        self.A = nn.Parameter(a_ERI, requires_grad=trainable)
        self.B = nn.Parameter(b_ERO, requires_grad=trainable)

    def forward(self, x_BTI: Tensor, gate_BTE: Tensor) -> Tensor:
        """sum_e gate_e * B_e A_e x over the first E experts, E being the width of the gate: (B, T, O)."""
        num_experts = gate_BTE.shape[-1]
        a_ERI, b_ERO = self.A[:num_experts], self.B[:num_experts]
        if not torch.is_autocast_enabled(x_BTI.device.type):  # autocast would take the cast back
            x_BTI = x_BTI.to(a_ERI.dtype)
        down_BTF = F.linear(x_BTI, a_ERI.flatten(0, 1))  # F = E * R
        down_BTER = down_BTF.view(*down_BTF.shape[:2], num_experts, -1)
        gated_BTER = down_BTER * gate_BTE.to(down_BTER.dtype).unsqueeze(-1)
        return gated_BTER.flatten(-2) @ b_ERO.flatten(0, 1)


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


class StackedExperts(nn.Module):
    """All experts on one linear: a block of frozen ones, then a block of fresh ones, which an optimizer may hold."""

    frozen: ExpertBlock | None
    fresh: ExpertBlock | None

    def __init__(self, d_in: int, d_out: int) -> None:
        """No experts yet."""
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.frozen = self.fresh = None

    def forward(self, x_BTI: Tensor, gate_BTE: Tensor) -> Tensor:
        """The gated sum of the first E experts, E being the width of the gate: (B, T, O).

        Two blocks are added, not joined: joining would copy all experts each step and differentiate the frozen ones.
        """
        deltas: list[Tensor] = []
        start = 0
        for block in self.blocks:
            if start < gate_BTE.shape[-1]:  # a task older than the fresh block leaves it out
                deltas.append(block(x_BTI, gate_BTE[..., start : start + block.num_experts]))
            start += block.num_experts
        return deltas[0] if len(deltas) == 1 else deltas[0] + deltas[1]

    @property
    def blocks(self) -> list[ExpertBlock]:
        """The blocks that hold experts, in the order of expert indices."""
        return [block for block in (self.frozen, self.fresh) if block is not None]

    def add(self, pair: LoraPair, like: Tensor) -> None:
        """Append some experts to the fresh block, in the dtype and on the device of `like`.

        The parameters are new ones: an optimizer made before no longer holds what the model uses.
        """
        fresh = [] if self.fresh is None else [(self.fresh.A.detach(), self.fresh.B.detach())]
        a_ERI, b_ERO = zip(*fresh, (pair.a_ERI.to(like), pair.b_EOR.mT.to(like)), strict=True)
        self.fresh = ExpertBlock(torch.cat(a_ERI), torch.cat(b_ERO), trainable=True)

    def freeze(self) -> None:
        """Move the fresh experts into the frozen block."""
        if self.fresh is not None:
            self.frozen, self.fresh = ExpertBlock(*self._all(), trainable=False), None

    def keep(self, stand_ins: StandIns) -> ExpertBlock:
        """Hold only the experts that stay, each as the mean of those it stands in for; returns the whole block."""
        assert self.frozen is not None and self.fresh is None, "frozen experts alone are kept or left"
        whole = self.frozen
        means = [_mean(whole, stand_ins.mean_of(expert)) for expert in stand_ins.kept]
        a_SRI, b_SRO = (torch.stack(matrices) for matrices in zip(*means, strict=True))
        self.frozen = ExpertBlock(a_SRI, b_SRO, trainable=False)
        return whole

    def read(self, experts: range) -> LoraPair:
        """Copies of some experts, on the device they live on."""
        a_ERI, b_ERO = (stacked[experts.start : experts.stop] for stacked in self._all())
        return LoraPair(a_ERI.clone(), b_ERO.mT.contiguous())

    def _all(self) -> tuple[Tensor, Tensor]:
        """A (E, R, I) and B (E, R, O) over both blocks, copied."""
        a_ERI, b_ERO = zip(*((block.A.detach(), block.B.detach()) for block in self.blocks), strict=True)
        return torch.cat(a_ERI), torch.cat(b_ERO)


class ExpertBank(nn.Module):
    """A frozen FFN or linear, the experts on its linears, and the routers whose gate they share."""

    anchor: Tensor

    def __init__(
        self,
        site: Site,
        frozen: nn.Module,
        context: RouteContext,
        *,
        rank: int,
        alpha: float,
        top_k: int,
        dtype: torch.dtype,
    ) -> None:
        """A bank without experts around the module found at `site`; the linears in it are wrapped by surgery."""
        super().__init__()
        self.site, self.frozen, self.context, self.rank, self.alpha = site, frozen, context, rank, alpha
        linears: list[Any] = [frozen.get_submodule(path) for path in site.linears]
        self.experts = nn.ModuleDict()
        for path, linear in zip(site.linears, linears, strict=True):
            self.experts[stack_name(path)] = StackedExperts(linear.in_features, linear.out_features)
        self.routers = Routers(linears[0].in_features, top_k)
        # New experts and routers are made where this is: it follows `.to()`, also while the bank is empty.
        self.register_buffer("anchor", torch.zeros(1, dtype=dtype, device=linears[0].weight.device), persistent=False)
        self._gate_BTE: Tensor | None = None
        self._merged: StandIns | None = None

    def forward(self, h_BTD: Tensor, *args: Any) -> Tensor:
        """What the frozen module returns, its linears carrying the experts under the plan in use.

        Patches of several pictures that lie in one sequence, (T, D), are rows of one token each.
        """
        self._gate_BTE = self._gate(h_BTD if h_BTD.ndim == 3 else h_BTD.unsqueeze(1))
        try:
            return cast(Tensor, self.frozen(h_BTD, *args))
        finally:
            self._gate_BTE = None

    def delta(self, linear: str, x_BTI: Tensor) -> Tensor | None:
        """What the experts add to a linear's output; None where the plan wants none, and nothing is computed then."""
        if self._gate_BTE is None:
            return None
        if x_BTI.ndim == 3:
            return cast(Tensor, self.experts[linear](x_BTI, self._gate_BTE))
        return cast(Tensor, self.experts[linear](x_BTI.unsqueeze(1), self._gate_BTE)).squeeze(1)

    @property
    def stacks(self) -> dict[str, StackedExperts]:
        """Stacked experts per linear."""
        return {key: cast(StackedExperts, module) for key, module in self.experts.items()}

    @property
    def num_experts(self) -> int:
        """Experts of the site, frozen and fresh."""
        return sum(block.num_experts for block in next(iter(self.stacks.values())).blocks)

    def _gate(self, h_BTD: Tensor) -> Tensor | None:
        """Gate times alpha / rank (here, once per site), as wide as the experts the newest task of the plan knows."""
        context, device = self.context, h_BTD.device
        plan = context.image_plan_on(device, len(h_BTD)) if self.site.of_images else context.plan_on(device)
        if plan is None or plan.newest < 0 or self.num_experts == 0:
            return None
        if plan.newest >= len(self.routers):
            raise ValueError(
                f"{self.site.name}: the route plan asks for task {plan.newest}, but {len(self.routers)} tasks have "
                "routers here; call add_router() once per task"
            )
        if self.routers.widths[plan.newest] == 0:
            return None
        gate: Gate = self.routers(h_BTD, plan)
        if context.observation is not None:
            counts_E, probability_E = gate.counts(plan.mask_BT), gate.probability(plan.mask_BT)
            context.observation.add(self.site.name, counts_E, probability_E)
        gate_BTE = gate.gate_BTE if self._merged is None else self._merged.gate_of(gate.gate_BTE)
        return gate_BTE * (self.alpha / self.rank) if gate_BTE.shape[-1] else None

    def grow(
        self,
        num: int,
        *,
        generator: torch.Generator,
        init_from: Mapping[str, LoraPair] | None = None,
        noise: float = 0.0,
    ) -> None:
        """Add fresh, trainable experts: LoRA's init (A random, B = 0: no effect yet), or copies of `expert(i, ...)`.

        They are copies of one expert or of as many, and differ from it, and from each other, by `noise` standard
        deviations.
        """
        assert self._merged is None, "a merged bank only answers; learning goes on in one that is not merged"
        for key, stack in self.stacks.items() if num else ():
            if init_from is None:
                a_ERI = linear_init((num, self.rank, stack.d_in), generator)
                pair = LoraPair(a_ERI, torch.zeros(num, stack.d_out, self.rank))
            else:
                pair = init_from[key].copies(num, noise, generator)
            stack.add(pair, like=self.anchor)

    def expert(self, index: int, num: int = 1) -> dict[str, LoraPair]:
        """A copy per linear of one expert, or of `num` from this one on, to start new ones from; -1 is the newest."""
        index = range(self.num_experts)[index]
        return {key: stack.read(range(index, index + num)) for key, stack in self.stacks.items()}

    def add_router(self, *, generator: torch.Generator, lead_D: Tensor | None = None) -> None:
        """Give the next task a trainable router over all experts that exist now, whether the site grew or not.

        It starts random, but for `lead_D` on top of the rows of experts that are new since the router before.
        """
        self.routers.grow(self.num_experts, self.anchor.device, generator, lead_D)

    def freeze(self) -> None:
        """End a task: its experts and its router change no more."""
        for stack in self.stacks.values():
            stack.freeze()
        self.routers.freeze()

    def merge(self, stand_ins: StandIns) -> dict[str, ExpertBlock]:
        """Leave out experts that others stand in for; returns all as they were, for `unmerge`. It then only answers.

        Raises:
            ValueError: the stand-ins are those of another number of experts.
        """
        if len(stand_ins.of_E) != self.num_experts:
            raise ValueError(
                f"{self.site.name}: stand-ins for {len(stand_ins.of_E)} experts, the site has {self.num_experts}; "
                "merge a run as it was when the merge was found"
            )
        self._merged = stand_ins
        return {key: stack.keep(stand_ins) for key, stack in self.stacks.items()}

    def unmerge(self, whole: Mapping[str, ExpertBlock]) -> None:
        """Take back all experts."""
        self._merged = None
        for key, stack in self.stacks.items():
            stack.frozen = whole[key]

    def drop_fresh(self) -> None:
        """Forget the experts and routers since the last `freeze()`: probes."""
        for stack in self.stacks.values():
            stack.fresh = None
        self.routers.drop_fresh()


class ExpertLinear(nn.Module):
    """A frozen linear of whatever class, plus what the bank adds to its output."""

    def __init__(self, frozen: nn.Module, delta: Callable[[Tensor], Tensor | None]) -> None:
        """`delta` is the bank's, for this linear: a function, so that the bank stays in one place of the tree."""
        super().__init__()
        self.frozen = frozen
        self.delta = delta

    def forward(self, x_BTI: Tensor) -> Tensor:
        """The frozen output, untouched where the plan wants no experts; the sum is in the frozen output's dtype."""
        y_BTO: Tensor = self.frozen(x_BTI)
        delta_BTO = self.delta(x_BTI)
        return y_BTO if delta_BTO is None else y_BTO + delta_BTO.to(y_BTO.dtype)
