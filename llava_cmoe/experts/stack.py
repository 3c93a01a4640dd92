"""Stacked LoRA experts on one linear: the gated sum of them, and which of them learn.

    x_BTI --- [A_1 .. A_E]: I -> E*R --- times gate_BTE --- [B_1 .. B_E]: E*R -> O

A sum over experts is the inner sum of a matrix product, so with the experts stacked along the concatenated rank E*R
their mixture is two matrix products with the gate in between. Sites, routers and the scale alpha / rank: `bank.py`.
Shape letters: B batch, T tokens, E experts, R rank, I and O input and output width of the linear.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_cmoe.experts.grouped import grouped_sum, pays


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
    """Some experts on one linear, all of them frozen or all of them trainable: A (E, R, I) and B (E, R, O).

    B rests transposed, so that concatenating the ranks is a view. From (E, O, R) each forward would copy every expert:
    6 to 9 times a decoding step's time as measured on a CPU, and copies kept for backward.
    """

    def __init__(self, ids: Iterable[int], a_ERI: Tensor, b_ERO: Tensor, trainable: bool) -> None:
        """Take the tensors over as parameters; `ids` name the experts, ascending."""
        super().__init__()
        self.ids = tuple(ids)  # under ZeRO-3 a parameter at rest has no shape
        self.A = nn.Parameter(a_ERI, requires_grad=trainable)
        self.B = nn.Parameter(b_ERO, requires_grad=trainable)
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, x_BTI: Tensor, gate_BTE: Tensor, first: int = 0, top_BTC: Tensor | None = None) -> Tensor | None:
        """sum_e gate_e * B_e A_e x over the experts that are columns of the gate: (B, T, O); None if none is.

        `first` is the id of the gate's first column; `top_BTC` the only columns that are not zero, where that is known.
        """
        start, stop = bisect_left(self.ids, first), bisect_left(self.ids, first + gate_BTE.shape[-1])
        if start == stop:
            return None
        ids, num_experts = self.ids[start:stop], stop - start
        a_ERI, b_ERO = (matrix[start:stop] for matrix in self._in(x_BTI))
        if ids[-1] - ids[0] + 1 == num_experts:
            if top_BTC is not None and pays(x_BTI, a_ERI, b_ERO, top_BTC.shape[-1]):
                share_BTC = gate_BTE.gather(-1, top_BTC)
                return grouped_sum(x_BTI, a_ERI, b_ERO, top_BTC + first - ids[0], share_BTC)
            gate_BTE = gate_BTE[..., ids[0] - first : ids[-1] - first + 1]
        else:
            gate_BTE = gate_BTE[..., [expert - first for expert in ids]]
        down_BTF = F.linear(x_BTI, a_ERI.flatten(0, 1))  # F = E * R
        down_BTER = down_BTF.view(*down_BTF.shape[:2], num_experts, -1)
        gated_BTER = down_BTER * gate_BTE.to(down_BTER.dtype).unsqueeze(-1)
        return gated_BTER.flatten(-2) @ b_ERO.flatten(0, 1)

    def _in(self, x_BTI: Tensor) -> tuple[Tensor, Tensor]:
        """A and B in the dtype of the activations, as autocast would cast them; products accumulate in float32 anyway.

        Copies of frozen experts are kept while nothing learns: cast in each decoding step they would be read and
        written once more, which is what such a step waits for. In bfloat16 they take half of what float32 experts do.
        """
        if x_BTI.dtype == self.A.dtype or torch.is_autocast_enabled(x_BTI.device.type):
            return self.A, self.B
        if torch.is_grad_enabled() or self.A.requires_grad:
            return self.A.to(x_BTI.dtype), self.B.to(x_BTI.dtype)
        key = (x_BTI.dtype, x_BTI.device)
        if key not in self._cast:
            self._cast[key] = (self.A.to(x_BTI.dtype), self.B.to(x_BTI.dtype))
        return self._cast[key]

    def select(self, ids: Iterable[int]) -> tuple[Tensor, Tensor]:
        """A (E, R, I) and B (E, R, O) of some of its experts, copied."""
        places = [self.ids.index(expert) for expert in ids]
        return self.A.detach()[places], self.B.detach()[places]


class StackedExperts(nn.Module):
    """All experts on one linear: a block of frozen ones and a block of trainable ones, which an optimizer may hold."""

    frozen: ExpertBlock | None
    trainable: ExpertBlock | None

    def __init__(self, d_in: int, d_out: int) -> None:
        """No experts yet."""
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.frozen = self.trainable = None

    def forward(self, x_BTI: Tensor, gate_BTE: Tensor, first: int = 0, top_BTC: Tensor | None = None) -> Tensor | None:
        """The gated sum of the experts that are columns of the gate: (B, T, O); None if none is.

        Two blocks are added, not joined: joining would copy all experts each step and differentiate the frozen ones.
        """
        deltas = [delta for block in self.blocks if (delta := block(x_BTI, gate_BTE, first, top_BTC)) is not None]
        if not deltas:
            return None
        delta_BTO: Tensor = deltas[0] if len(deltas) == 1 else deltas[0] + deltas[1]
        return delta_BTO

    @property
    def blocks(self) -> list[ExpertBlock]:
        """The blocks that hold experts, the frozen one first."""
        return [block for block in (self.frozen, self.trainable) if block is not None]

    def add(self, ids: Iterable[int], pair: LoraPair, like: Tensor) -> None:
        """Add experts to the trainable block, in the dtype and on the device of `like`.

        The parameters are new ones: an optimizer made before no longer holds what the model uses.

        Raises:
            ValueError: an expert of this id is there already.
        """
        ids = tuple(ids)
        if taken := sorted(expert for block in self.blocks for expert in block.ids if expert in ids):
            raise ValueError(f"experts {taken} are there already; ids are given once")
        added = ExpertBlock(ids, pair.a_ERI.to(like), pair.b_EOR.mT.to(like), trainable=True)
        self.trainable = _joined([self.trainable, added], trainable=True)

    def freeze(self, ids: Iterable[int] | None = None) -> None:
        """Move trainable experts into the frozen block; all of them where none is named."""
        named = None if ids is None else set(ids)
        if self.trainable is not None:
            chosen = tuple(expert for expert in self.trainable.ids if named is None or expert in named)
            self.frozen = _joined([self.frozen, _part(self.trainable, chosen)], trainable=False)
            self.trainable = _without(self.trainable, chosen)

    def drop(self, ids: Iterable[int]) -> None:
        """Remove experts for good, from whichever block holds them."""
        gone = tuple(ids)
        self.frozen, self.trainable = _without(self.frozen, gone), _without(self.trainable, gone)

    def read(self, ids: Iterable[int]) -> LoraPair:
        """Copies of some experts, on the device they live on."""
        matrices = [next(block.select([expert]) for block in self.blocks if expert in block.ids) for expert in ids]
        a_ERI, b_ERO = (torch.cat(halves) for halves in zip(*matrices, strict=True))
        return LoraPair(a_ERI, b_ERO.mT.contiguous())


def _joined(blocks: Iterable[ExpertBlock | None], trainable: bool) -> ExpertBlock | None:
    """One block of all experts of some, by ascending id."""
    some = [block for block in blocks if block is not None]
    if not some:
        return None
    ids = [expert for block in some for expert in block.ids]
    a_ERI, b_ERO = (torch.cat([getattr(block, name).detach() for block in some]) for name in "AB")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    if order != list(range(len(ids))):
        a_ERI, b_ERO = a_ERI[order], b_ERO[order]
    return ExpertBlock([ids[place] for place in order], a_ERI, b_ERO, trainable)


def _part(block: ExpertBlock, ids: tuple[int, ...]) -> ExpertBlock | None:
    return ExpertBlock(ids, *block.select(ids), trainable=False) if ids else None


def _without(block: ExpertBlock | None, ids: tuple[int, ...]) -> ExpertBlock | None:
    """What is left of a block, the very block where nothing goes."""
    if block is None or not set(ids) & set(block.ids):
        return block
    kept = tuple(expert for expert in block.ids if expert not in ids)
    return ExpertBlock(kept, *block.select(kept), trainable=block.A.requires_grad) if kept else None
