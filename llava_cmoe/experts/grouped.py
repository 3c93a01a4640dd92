"""The gated sum of experts by grouped products: for each token only the experts that it chose are computed.

    tokens, once per slot, sorted by expert --- A_e: I -> R --- times share --- B_e: R -> O --- summed per token

`stack.py` computes all experts of a block for all tokens: E * R columns, the fewer kernels. This way computes R columns
per slot, whatever E is, and pays for it by sorting tokens and copying them. Nothing is read back from the device: slots
whose expert is not among these lie behind the last group, where the product leaves whatever was in memory.
Shape letters: B batch, T tokens, C slots of a token, N slots in all, E experts, R rank, I and O widths of the linear.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

RANK_PER_SLOT = {"cpu": 192}
"""Total rank E * R, per slot of a token, above which this way is the faster one, by kind of device; where a device is
not named, all experts are computed. Measured on one core of a busy machine, float32, frozen experts, forward and
backward: equal between 14 and 30 experts of rank 16 (width 224, 3,000 tokens), and between 14 and 62 of rank 8 (width
1,024, 384 tokens), two slots each."""

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
    place_N = place_BTC.flatten()
    place_N = torch.where((place_N >= 0) & (place_N < num_experts), place_N, num_experts)
    sorted_N, order_N = place_N.sort(stable=True)
    ends_E = torch.searchsorted(sorted_N, torch.arange(1, num_experts + 1, device=place_N.device)).to(torch.int32)
    token_N, inside_N1 = order_N // num_slots, (sorted_N < num_experts).unsqueeze(1)
    share_N1 = share_BTC.flatten()[order_N].unsqueeze(1)
    with torch.autocast(x_BTI.device.type, enabled=False):  # which does not know grouped products
        x_NI = torch.where(inside_N1, x_BTI.flatten(0, 1).index_select(0, token_N).to(dtype), 0)
        # Left out before and behind each product: what lies there may be NaN, and zero times NaN is NaN in backward.
        down_NR = torch.where(inside_N1, F.grouped_mm(x_NI, a_ERI.to(dtype).mT, offs=ends_E), 0)
        gated_NR = torch.where(inside_N1, down_NR * share_N1.to(dtype), 0)
        up_NO = torch.where(inside_N1, F.grouped_mm(gated_NR, b_ERO.to(dtype), offs=ends_E), 0)
        zeros_MO = up_NO.new_zeros(x_BTI.shape[0] * x_BTI.shape[1], up_NO.shape[-1])
        return zeros_MO.index_add(0, token_N, up_NO).view(*x_BTI.shape[:2], -1)


def _dtype(x_BTI: Tensor) -> torch.dtype:
    """What products are computed in."""
    kind = x_BTI.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTI.dtype
