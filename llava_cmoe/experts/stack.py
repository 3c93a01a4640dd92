"""Stacked LoRA experts on one linear: the gated sum of them, and which of them learn.

    x_BTI --- [A_1 .. A_E]: I -> E*R --- times gate_BTE --- [B_1 .. B_E]: E*R -> O

A sum over experts is the inner sum of a matrix product, so with the experts stacked along the concatenated rank E*R
their mixture is two matrix products with the gate in between. Sites, routers and the scale alpha / rank: `bank.py`.
Shape letters: B batch, T tokens, E experts, R rank, I and O input and output width of the linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True)
class Chosen:
    """Those experts of a block that are columns of a gate.

    Attributes:
        ids: experts of the gate's columns.
        places: of the chosen in the block; a slice, which copies nothing, where they follow each other.
        columns: of them in the gate, alike.
        place_E: per column the place of its expert in the block; -1 where it is not there.
    """

    ids: Sequence[int]
    places: slice | Tensor
    columns: slice | Tensor
    place_E: Tensor

    @classmethod
    def of(cls, ids: Sequence[int], block: Sequence[int], device: torch.device) -> Chosen:
        """Both ascending."""
        place_of = {expert: place for place, expert in enumerate(block)}
        places = [place_of.get(expert, -1) for expert in ids]
        columns = [column for column, place in enumerate(places) if place >= 0]
        chosen = [places[column] for column in columns]
        return cls(ids, _index(chosen, device), _index(columns, device), torch.tensor(places, device=device))


def _index(ascending: list[int], device: torch.device) -> slice | Tensor:
    if not ascending:
        return slice(0, 0)
    follow = ascending[-1] - ascending[0] + 1 == len(ascending)
    return slice(ascending[0], ascending[-1] + 1) if follow else torch.tensor(ascending, device=device)


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
        self._chosen: Chosen | None = None
        self._copies: dict[str, tuple[object, Tensor, Tensor]] = {}

    def forward(
        self, x_BTI: Tensor, gate_BTE: Tensor, ids: Sequence[int] | None = None, slots_BTC: Tensor | None = None
    ) -> Tensor | None:
        """sum_e gate_e * B_e A_e x over the experts that are columns of the gate: (B, T, O); None if none is.

        `ids` are the experts of the columns, those from 0 on where they are not named; `slots_BTC` the only columns
        that are not zero, where that is known.
        """
        chosen = self._among(range(gate_BTE.shape[-1]) if ids is None else ids, gate_BTE.device)
        mine_BTE = gate_BTE[..., chosen.columns]
        num_experts = mine_BTE.shape[-1]
        if num_experts == 0:
            return None
        if slots_BTC is not None and pays(x_BTI, num_experts, self.A, self.B, slots_BTC.shape[-1]):
            share_BTC = gate_BTE.gather(-1, slots_BTC)
            return grouped_sum(x_BTI, *self._in(x_BTI, slice(None)), chosen.place_E[slots_BTC], share_BTC)
        a_ERI, b_ERO = self._in(x_BTI, chosen.places)
        down_BTF = F.linear(x_BTI, a_ERI.flatten(0, 1))  # F = E * R
        down_BTER = down_BTF.view(*down_BTF.shape[:2], num_experts, -1)
        gated_BTER = down_BTER * mine_BTE.to(down_BTER.dtype).unsqueeze(-1)
        return gated_BTER.flatten(-2) @ b_ERO.flatten(0, 1)

    def _among(self, ids: Sequence[int], device: torch.device) -> Chosen:
        """Which of its experts a gate weighs; worked out once for as long as gates name the same."""
        found = self._chosen
        if found is None or found.place_E.device != device or found.ids != ids:
            found = self._chosen = Chosen.of(ids, self.ids, device)
            self._copies.pop("chosen", None)
        return found

    def _in(self, x_BTI: Tensor, places: slice | Tensor) -> tuple[Tensor, Tensor]:
        """A and B of some experts in the dtype of the products; these accumulate in float32 anyway.

        Copies of frozen experts are kept: made in each step they would be read and written once more, which is what a
        step of decoding waits for. One of all, while nothing learns, which in bfloat16 takes half of what float32
        experts do; one of those chosen last where these do not follow each other.
        """
        kind = x_BTI.device.type
        autocast, follow = torch.is_autocast_enabled(kind), isinstance(places, slice)
        if follow and (autocast or x_BTI.dtype == self.A.dtype):
            return self.A[places], self.B[places]
        dtype = torch.get_autocast_dtype(kind) if autocast else x_BTI.dtype
        if self.A.requires_grad or (follow and torch.is_grad_enabled()):
            return self.A[places].to(dtype), self.B[places].to(dtype)
        which, wanted = ("all", slice(None)) if follow else ("chosen", places)
        made_for = (dtype, x_BTI.device, torch.is_inference_mode_enabled())
        if which not in self._copies or self._copies[which][0] != made_for:
            self._copies[which] = made_for, self.A.detach()[wanted].to(dtype), self.B.detach()[wanted].to(dtype)
        _, a_ERI, b_ERO = self._copies[which]
        return (a_ERI[places], b_ERO[places]) if follow else (a_ERI, b_ERO)

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

    def forward(
        self, x_BTI: Tensor, gate_BTE: Tensor, ids: Sequence[int] | None = None, slots_BTC: Tensor | None = None
    ) -> Tensor | None:
        """The gated sum of the experts that are columns of the gate: (B, T, O); None if none is.

        Two blocks are added, not joined: joining would copy all experts each step and differentiate the frozen ones.
        """
        deltas = [delta for block in self.blocks if (delta := block(x_BTI, gate_BTE, ids, slots_BTC)) is not None]
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
