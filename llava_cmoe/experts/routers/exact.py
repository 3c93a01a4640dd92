"""Router logits that no batch mate can move: summed in float64 and rounded once.

A float32 sum depends on the kernel, which depends on batch and width: the same token would get other logits alone than
among batch mates. The D * E products per token are some 1/4000 of an FFN's work.
Shape letters: B batch, T tokens, D hidden, F rows of a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def exact_logits(h_BTD: Tensor, weight_FD: Tensor) -> Tensor:
    """States times a weight, h W^T, in float32 (..., F); its sums over D are taken in float64 in both directions.

    Args:
        h_BTD: states (..., D) of any float dtype.
        weight_FD: one weight for all, or one per sample, (B, F, D) for (B, T, D) states.
    """
    found: Tensor = _ExactLogits.apply(h_BTD, weight_FD)  # type: ignore[no-untyped-call]
    return found


class _ExactLogits(torch.autograd.Function):
    """Keeps for backward what it was given, and casts again: the float64 copy of h is twice to four times as large."""

    @staticmethod
    def forward(ctx: Any, h_BTD: Tensor, weight_FD: Tensor) -> Tensor:
        ctx.save_for_backward(h_BTD, weight_FD)
        return (h_BTD.double() @ weight_FD.double().mT).float()

    @staticmethod
    def backward(ctx: Any, grad_BTF: Tensor) -> tuple[Tensor | None, Tensor | None]:
        h_BTD, weight_FD = ctx.saved_tensors
        grad_BTF = grad_BTF.double()
        to_h = to_weight = None
        if ctx.needs_input_grad[0]:
            to_h = (grad_BTF @ weight_FD.double()).to(h_BTD.dtype)
        if ctx.needs_input_grad[1]:
            if weight_FD.ndim == 2:
                h_BTD, grad_BTF = h_BTD.flatten(0, -2), grad_BTF.flatten(0, -2)
            to_weight = (h_BTD.double().mT @ grad_BTF).mT.to(weight_FD.dtype)
        return to_h, to_weight
