"""The gated sum of experts by grouped products: for each token only the experts that it chose are computed.

    tokens, once per slot, sorted by expert --- A_e: I -> R --- times share --- B_e: R -> O --- summed per token

`stack.py` computes all experts of a block for all tokens: E * R columns, the fewer kernels. This way computes R columns
per slot, whatever E is, and pays for it by sorting tokens and copying them. Nothing is read back from the device: a
slot whose expert is not among these is computed, too, by the first of them and with a share of zero.
Shape letters: B batch, T tokens, C slots of a token, N slots in all, E experts, R rank, I and O widths of the linear.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

RANK_PER_SLOT = {"cpu": 112}
"""Total rank E * R, per slot of a token, above which this way is the faster one, by kind of device; where a device is
not named, all experts are computed. Measured on one core of a busy machine, float32, frozen experts, two slots, forward
and backward, by turns: this way takes 1.23 times as long at 80 and 0.94 at 112 (rank 16, width 224, 3,000 tokens), 1.22
at 80 and 0.90 at 120 (rank 8, width 1,024, 384 tokens), 1.10 at 80, 0.98 at 112 and 0.64 at 160 (rank 16, the same)."""

ALIGNED = 16
"""Bytes that a row of each operand must be a multiple of."""


def pays(x_BTI: Tensor, num_experts: int, a_ERI: Tensor, b_ERO: Tensor, num_slots: int) -> bool:
    """Whether this way is the faster one for so many of these experts, and can be taken; by shapes and device alone."""
    rank = a_ERI.shape[1]
    widths = (rank, a_ERI.shape[-1], b_ERO.shape[-1])
    aligned = all(width * _dtype(x_BTI).itemsize % ALIGNED == 0 for width in widths)
    known = hasattr(F, "grouped_mm")  # not to every torch that can be installed
    return known and aligned and num_experts * rank > RANK_PER_SLOT.get(x_BTI.device.type, math.inf) * num_slots


def grouped_sum(x_BTI: Tensor, a_ERI: Tensor, b_ERO: Tensor, place_BTC: Tensor, share_BTC: Tensor) -> Tensor:
    """sum_c share_c * B_e A_e x, e = place_c: (B, T, O).

    Args:
        x_BTI: input of the linear.
        a_ERI: A of the experts.
        b_ERO: B of the experts, transposed.
        place_BTC: place of the expert in each slot; one that is none of theirs adds nothing.
        share_BTC: weight of each slot.
    """
    num_experts, num_slots, dtype = len(a_ERI), place_BTC.shape[-1], _dtype(x_BTI)
    here_BTC = (place_BTC >= 0) & (place_BTC < num_experts)
    sorted_N, order_N = torch.where(here_BTC, place_BTC, 0).flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_N, torch.arange(1, num_experts + 1, device=order_N.device)).to(torch.int32)
    token_N = order_N // num_slots
    share_N1 = torch.where(here_BTC, share_BTC, 0).flatten()[order_N].unsqueeze(1)
    with torch.autocast(x_BTI.device.type, enabled=False):  # which does not know grouped products
        x_NI = x_BTI.flatten(0, 1).index_select(0, token_N).to(dtype)
        gated_NR = F.grouped_mm(x_NI, a_ERI.to(dtype).mT, offs=ends_E) * share_N1.to(dtype)
        up_NO = F.grouped_mm(gated_NR, b_ERO.to(dtype), offs=ends_E)
        zeros_MO = up_NO.new_zeros(x_BTI.shape[0] * x_BTI.shape[1], up_NO.shape[-1])
        return zeros_MO.index_add(0, token_N, up_NO).view(*x_BTI.shape[:2], -1)


def _dtype(x_BTI: Tensor) -> torch.dtype:
    """What products are computed in."""
    kind = x_BTI.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTI.dtype
