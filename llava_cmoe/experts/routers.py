"""Per-task routers of one site: a token's hidden state and a route plan in, a gate over the site's experts out.

What the gate weighs is `bank.py`; who chose the plan is not known here. Unlike the usual growing router, a router is
never widened: task t's weight keeps the E_t rows it was trained with, so nothing learned later can move its gate.
Shape letters: B batch, T tokens, D hidden, E experts, K tasks mixed for one sample, C top-k slots of a token,
N routers; S is B (images or patches, where rows are these), or 1 where one plan serves the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llava_cmoe.experts.plan import RoutePlan


class Gate(NamedTuple):
    """The gate of one forward pass over one site, and what balance loss and counts are derived from.

    A tuple, as ZeRO-3 hooks its gathering of the routers onto the tensors a module returns and looks into tuples only.

    Attributes:
        gate_BTE: weight of every expert for every token: float32, zero outside the top k, sum 1 (0 for task -1).
        logits_BTKE: router logits per mixed task; the float32 minimum where a router does not know the expert.
        top_BTKC: experts in the top-k slots.
        known_SKE: which experts each mixed task's router knows; none for task -1.
        weights_SK: weight of each mixed task.
    """

    gate_BTE: Tensor
    logits_BTKE: Tensor
    top_BTKC: Tensor
    known_SKE: Tensor
    weights_SK: Tensor

    def counts(self, mask_BT: Tensor | None) -> Tensor:
        """Top-k slots of non-pad tokens per expert: (E,) int64, no host sync."""
        chosen_BTKE = torch.zeros_like(self.logits_BTKE, dtype=torch.bool).scatter(-1, self.top_BTKC, True)
        counts_BTE = (chosen_BTKE & self.known_SKE.unsqueeze(1)).sum(dim=2)
        return _over_tokens(counts_BTE, mask_BT)

    def probability(self, mask_BT: Tensor | None) -> Tensor:
        """Softmax over all of a router's own experts, summed over non-pad tokens: (E,), differentiable."""
        share_BTKE = self.logits_BTKE.softmax(dim=-1) * self.known_SKE.unsqueeze(1)
        return _over_tokens((share_BTKE * self.weights_SK[:, None, :, None]).sum(dim=2), mask_BT)


class Routers(nn.Module):
    """One router per task for one site, as parameters `task_0`, `task_1`, ... of shape (E_t, D) in float32."""

    def __init__(self, hidden_size: int, top_k: int) -> None:
        """No routers yet; `widths` holds the number of experts that each router knows."""
        super().__init__()
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.widths: list[int] = []
        self.num_frozen = 0

    def __len__(self) -> int:
        """Tasks that have a router here."""
        return len(self.widths)

    def weight(self, task: int) -> Tensor | None:
        """Weight (E_t, D) of one task's router, None where the site had no experts then."""
        weight: Tensor | None = getattr(self, f"task_{task}")
        return weight

    def add(self, weight_ED: Tensor | None) -> None:
        """Append the next task's router, trainable; None for a site without experts (empty tensors break ZeRO)."""
        width = 0 if weight_ED is None else len(weight_ED)
        if self.widths and width < self.widths[-1]:
            raise ValueError(f"a router over {width} experts after one over {self.widths[-1]}: experts never vanish")
        parameter = None if weight_ED is None else nn.Parameter(weight_ED.float())
        self.register_parameter(f"task_{len(self)}", parameter)
        self.widths.append(width)

    def grow(
        self, num_experts: int, device: torch.device, generator: torch.Generator, lead_D: Tensor | None = None
    ) -> None:
        """Append the next task's router over `num_experts`, drawn as `nn.Linear` draws its weight.

        Every site gets one per task, so that router numbers are task indices, also where no expert was added or exists.
        `lead_D` is added to the rows of experts that the router before does not know: a start in their favour.
        """
        weight_ED = linear_init((num_experts, self.hidden_size), generator)
        if lead_D is not None:
            weight_ED[self.widths[-1] if self.widths else 0 :] += lead_D.to(weight_ED)
        self.add(weight_ED.to(device) if num_experts else None)

    def new_experts(self, task: int) -> range:
        """Indices of the experts that one task added: those its router knows and the router before did not."""
        if not 0 <= task < len(self):
            raise ValueError(f"no task {task}: {len(self)} tasks have routers")
        return range(self.widths[task - 1] if task else 0, self.widths[task])

    def freeze(self) -> None:
        """Train none of the routers any more."""
        self.requires_grad_(False)
        self.num_frozen = len(self)

    def drop_fresh(self) -> None:
        """Forget the routers added since the last `freeze()`."""
        while len(self) > self.num_frozen:
            self.widths.pop()
            delattr(self, f"task_{len(self)}")

    def forward(self, h_BTD: Tensor, plan: RoutePlan) -> Gate:
        """The gate of every token under `plan`; all computed at width E of the plan's newest task.

        A token's top k (fewer where its router knows fewer) are renormalised: the softmax over all experts, cut to the
        top k and divided by its sum, equals the softmax over the top k logits, which is what is computed.
        """
        # Outside autocast and in float32: a bf16 softmax ties and flips neighbours in the top k.
        with torch.autocast(h_BTD.device.type, enabled=False):
            logits_BTKE, known_SKE, weights_SK = self._under(plan, h_BTD)
            # Finite: with -inf, a row that knows no expert (task -1) would be 0/0, and NaN in backward.
            logits_BTKE = logits_BTKE.masked_fill(~known_SKE.unsqueeze(1), torch.finfo(torch.float32).min)
            # A stable sort, as torch.topk leaves the order of ties open: among equals the oldest expert wins.
            sorted_BTKE, order_BTKE = logits_BTKE.sort(dim=-1, descending=True, stable=True)
            top_BTKC = order_BTKE[..., : self.top_k]
            share_BTKC = sorted_BTKE[..., : self.top_k].softmax(dim=-1)
            gate_BTKE = torch.zeros_like(logits_BTKE).scatter(-1, top_BTKC, share_BTKC) * known_SKE.unsqueeze(1)
            gate_BTE = (gate_BTKE * weights_SK[:, None, :, None]).sum(dim=2)
        return Gate(gate_BTE, logits_BTKE, top_BTKC, known_SKE, weights_SK)

    def _under(self, plan: RoutePlan, h_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the routers the plan asks for, the experts they know (S, K, E), and the plan's weights (S, K)."""
        newest = self.weight(plan.newest)
        assert newest is not None, "banks skip a site whose newest router knows no expert"
        if plan.tasks_BK.numel() == 1:  # one task for all: its weight as it is, nothing stacked or gathered
            known_SKE = newest.new_ones(1, 1, len(newest), dtype=torch.bool)
            return self._logits(h_BTD, newest[None, None]), known_SKE, plan.weights_BK
        # Only routers up to the newest asked for: their padded width never depends on later tasks. The last row knows
        # nothing and is what task -1 picks; it also serves tasks from before the site had experts.
        nothing = newest.new_zeros(0, self.hidden_size)
        stored = [self.weight(task) for task in range(plan.newest + 1)]
        rows = [nothing if weight is None else weight for weight in stored]
        weight_NED = pad_sequence([*rows, nothing], batch_first=True)
        known_NE = pad_sequence([torch.ones_like(row[:, 0], dtype=torch.bool) for row in [*rows, nothing]], True)
        tasks_SK, weights_SK = plan.rows()
        if plan.sample_I is not None and h_BTD.shape[1] == 1:
            # Rows are patches, thousands of them: a weight for each would be larger than the logits of all routers.
            all_BNE = self._logits(h_BTD, weight_NED[None])[:, 0]
            logits_BTKE = all_BNE[torch.arange(len(h_BTD), device=h_BTD.device)[:, None], tasks_SK].unsqueeze(1)
        else:
            logits_BTKE = self._logits(h_BTD, weight_NED[tasks_SK])
        return logits_BTKE, known_NE[tasks_SK], weights_SK

    def _logits(self, h_BTD: Tensor, weight_SKED: Tensor) -> Tensor:
        """Logits (B, T, K, E) in float32, their sums over D taken in float64.

        A float32 sum depends on the kernel, which depends on batch and width: the same token would get other logits
        alone than among batch mates. Summed in float64 and rounded once they agree. D * E products per token are
        some 1/4000 of an FFN's work.
        """
        num_plans, num_mixed, num_experts, _ = weight_SKED.shape
        weight_SDF = weight_SKED.double().flatten(1, 2).mT  # F = K * E
        if num_plans == 1:
            logits_BTF = h_BTD.double() @ weight_SDF[0]
        elif num_plans == len(h_BTD):
            logits_BTF = torch.bmm(h_BTD.double(), weight_SDF)
        else:
            raise ValueError(
                f"the route plan is for {num_plans} samples, the batch has {len(h_BTD)}; give it one row per sample"
            )
        return logits_BTF.float().view(*h_BTD.shape[:2], num_mixed, num_experts)


def _over_tokens(value_BTE: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Sum over the non-pad tokens."""
    if mask_BT is None:
        return value_BTE.sum(dim=(0, 1))
    if mask_BT.shape not in (value_BTE.shape[:2], (len(value_BTE), 1)):
        raise ValueError(
            f"the plan's mask is {tuple(mask_BT.shape)}, the forward pass {tuple(value_BTE.shape[:2])}; "
            "observe whole forward passes, not cached decoding"
        )
    return (value_BTE * mask_BT.unsqueeze(-1)).sum(dim=(0, 1))


def linear_init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in 1 / sqrt(fan-in): `nn.Linear`'s init of a weight, and LoRA's of A (Kaiming-uniform with a = sqrt(5)).

    Drawn on the CPU in float32, so that a seed gives the same experts on any device and in any precision.
    """
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
