"""The usual growing router: one softmax over all experts, to which every task adds rows; rows of old tasks are frozen.

    w = softmax(R h), R = [R_old; R_new]        a token uses its top k, renormalised

Unlike a router per task (`per_task.py`) it needs no locator, and pays for that: a later task's rows can draw an old
task's tokens away. While a task is learned, a guided router keeps a token from the new experts unless their best score
clearly exceeds the old ones' best: (c_new - c_old) / max(|c_new|, |c_old|) above a margin (LLaVA-DyMoE, arXiv
2603.27481).
Shape letters: B batch, T tokens, D hidden, E experts, N new ones of them, C top-k slots of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.routers.base import Gate, Router
from llava_cmoe.experts.routers.exact import exact_logits


@dataclass(frozen=True)
class Scores:
    """What one forward pass decided at a site, for losses.

    Attributes:
        logits_BTE: of all experts, the new ones last, before any guidance; differentiable.
        slots_BTC: the experts chosen.
        num_old: how many of the experts are old.
    """

    logits_BTE: Tensor
    slots_BTC: Tensor
    num_old: int


class WidenedRouter(Router):
    """Buffer `frozen_ED`, the rows of earlier tasks, and parameter `newest` (N, D), those of the task that learns."""

    frozen_ED: Tensor
    newest: nn.Parameter | None

    def __init__(self, width: int, top_k: int, margin: float | None = None) -> None:
        """No task yet; `margin` guides tokens while a task is learned, None lets the scores alone decide."""
        super().__init__()
        self.width, self.top_k, self.margin = width, top_k, margin
        self.scores: Scores | None = None
        self.register_parameter("newest", None)
        self.register_buffer("frozen_ED", torch.zeros(0, width), persistent=False)

    def add_task(self, rows_ND: Tensor) -> None:
        """Begin a task's rows, one for each of its experts."""
        self.newest = nn.Parameter(rows_ND.float())
        self.frozen_ED = self.frozen_ED.to(rows_ND.device)

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """The gate of every token over all experts; what it scored is kept while it learns, for `take`."""
        del forward_pass
        rows_ED = self.frozen_ED if self.newest is None else torch.cat([self.frozen_ED, self.newest])
        if not len(rows_ED):
            return None
        with torch.autocast(h_BTD.device.type, enabled=False):
            logits_BTE = exact_logits(h_BTD, rows_ED)
            guided_BTE = self._guided(logits_BTE)
            # A stable sort, as torch.topk leaves the order of ties open: among equals the oldest expert wins.
            sorted_BTE, order_BTE = guided_BTE.sort(dim=-1, descending=True, stable=True)
            slots_BTC = order_BTE[..., : self.top_k]
            share_BTC = sorted_BTE[..., : self.top_k].softmax(dim=-1)
            gate_BTE = torch.zeros_like(logits_BTE).scatter(-1, slots_BTC, share_BTC)
        if self.training and self.newest is not None:
            self.scores = Scores(logits_BTE, slots_BTC, len(self.frozen_ED))
        return Gate(gate_BTE, slots_BTC=slots_BTC)

    def _guided(self, logits_BTE: Tensor) -> Tensor:
        """The logits, those of the new experts at the float32 minimum for tokens that are kept from them."""
        num_old = len(self.frozen_ED)
        if self.margin is None or not self.training or self.newest is None or num_old == 0:
            return logits_BTE
        best_old_BT1 = logits_BTE[..., :num_old].amax(dim=-1, keepdim=True)
        best_new_BT1 = logits_BTE[..., num_old:].amax(dim=-1, keepdim=True)
        larger_BT1 = torch.maximum(best_old_BT1.abs(), best_new_BT1.abs())
        kept_BT1 = best_new_BT1 - best_old_BT1 <= self.margin * larger_BT1
        is_new_E = torch.arange(logits_BTE.shape[-1], device=logits_BTE.device) >= num_old
        return logits_BTE.masked_fill(kept_BT1 & is_new_E, torch.finfo(torch.float32).min)

    def take(self) -> Scores:
        """What the last forward pass decided while it learned; it is kept no longer."""
        scores, self.scores = self.scores, None
        assert scores is not None, "the model has run, and a task is being learned"
        return scores

    def state_of(self, task: int) -> dict[str, Tensor]:
        """The rows of the task that is being learned."""
        del task
        assert self.newest is not None, "to be read before it is frozen"
        return {"router": self.newest.detach().to("cpu", copy=True)}

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """A row for every expert that has none yet."""
        return {"router": (num_experts - len(self.frozen_ED), self.width)}

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Append the task's rows."""
        self.add_task(tensors["router"].to(device, copy=True))

    def freeze(self) -> None:
        """Add the newest rows to those that never change again."""
        if self.newest is not None:
            self.frozen_ED = torch.cat([self.frozen_ED, self.newest.detach()])
            self.newest = None

    def discard_trainable(self) -> None:
        """Forget the rows that are not frozen yet."""
        self.newest = None
