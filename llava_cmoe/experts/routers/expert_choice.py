"""Routers by which experts choose patches, as patch-level routing has it, instead of patches choosing experts.

    score_je = <w_e, h_j * (1 + U q)>      j over the picture's tokens, q the pooled instruction, U = P Q of low rank
    J_e      = the l best of expert e      l = capacity / k of the picture's tokens, at least one
    gate_je  = l * softmax over J_e        and nothing for any other token: a patch has several experts, or none

A causal LLM may choose among the tokens of the picture alone, as a later token of the text would tell an earlier one
what follows. The choice is made when a prompt is read; while an answer is decoded no token is the picture's.
Shape letters: B batch, T tokens, D hidden, E columns of the gate, K experts of one task, N tasks, R rank of U.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.init import linear_init
from llava_cmoe.experts.routers.base import Gate
from llava_cmoe.experts.routers.exact import exact_logits
from llava_cmoe.experts.routers.mid_depth import pooled
from llava_cmoe.experts.routers.task_parts import TaskParts


class ExpertChoice(TaskParts):
    """Of each task w (K, D), Q (R, D) and P (D, R); task t's experts are t * K to t * K + K - 1."""

    parts = ("keys", "into", "out_of")

    def __init__(self, hidden_size: int, num_new: int, capacity: float, condition_rank: int) -> None:
        """No task yet."""
        super().__init__()
        self.hidden_size, self.num_new = hidden_size, num_new
        self.capacity, self.condition_rank = capacity, condition_rank

    def add_task(self, device: torch.device, generator: torch.Generator) -> None:
        """Begin the next task: keys drawn as `nn.Linear` draws, and no condition yet (P = 0)."""
        keys_KD = linear_init((self.num_new, self.hidden_size), generator)
        into_RD = linear_init((self.condition_rank, self.hidden_size), generator)
        out_of_DR = torch.zeros(self.hidden_size, self.condition_rank)
        self.add(dict(zip(self.parts, (keys_KD, into_RD, out_of_DR), strict=True)), device)

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """The gate of every token: zero for all but the chosen patches of samples whose task is known here."""
        plan = forward_pass.plan
        if plan.max_task < 0 or not forward_pass.is_prefill or forward_pass.image_token is None:
            return None
        if plan.max_task >= self.num_tasks:
            raise ValueError(f"the route plan names task {plan.max_task}, but {self.num_tasks} tasks have routers here")
        tasks_B = plan.tasks_BK[:, 0].expand(len(h_BTD))
        with torch.autocast(h_BTD.device.type, enabled=False):
            gate_BTK = self._choose(h_BTD, forward_pass, tasks_B) * (tasks_B >= 0)[:, None, None]
        if len(plan.distinct) == 1:
            first = plan.max_task * self.num_new
            return Gate(gate_BTK, ids=range(first, first + self.num_new))
        column_BK = tasks_B.clamp_min(0)[:, None] * self.num_new + torch.arange(self.num_new, device=h_BTD.device)
        gate_BTE = gate_BTK.new_zeros(*gate_BTK.shape[:2], (plan.max_task + 1) * self.num_new)
        return Gate(gate_BTE.scatter(2, column_BK[:, None].expand_as(gate_BTK), gate_BTK))

    def _choose(self, h_BTD: Tensor, forward_pass: ForwardPass, tasks_B: Tensor) -> Tensor:
        """Gate (B, T, K) of each sample's own task."""
        prompt_BT = forward_pass.prompt_mask_BT
        patch_BT = forward_pass.image_mask_BT & prompt_BT
        place_B = torch.searchsorted(torch.tensor(forward_pass.plan.distinct, device=tasks_B.device), tasks_B)
        keys_BKD, into_BRD, out_of_BDR = (part_N[place_B] for part_N in self._stacked(forward_pass.plan.distinct))
        q_B1D = pooled(h_BTD, prompt_BT & ~patch_BT).unsqueeze(1)
        condition_B1D = exact_logits(exact_logits(q_B1D, into_BRD), out_of_BDR)
        score_BTK = exact_logits(h_BTD, keys_BKD * (1 + condition_B1D)).masked_fill(
            ~patch_BT[..., None], torch.finfo(torch.float32).min
        )
        num_B = patch_BT.sum(dim=1)
        most_B = (num_B * min(self.capacity / self.num_new, 1.0)).round().clamp_min(1)
        rank_BTK = score_BTK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen_BTK = (rank_BTK < most_B[:, None, None]) & patch_BT[..., None]
        share_BTK = score_BTK.masked_fill(~chosen_BTK, torch.finfo(torch.float32).min).softmax(dim=1)
        return most_B[:, None, None] * share_BTK * chosen_BTK

    def _stacked(self, tasks: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Parameters of some tasks (N, ...); -1 has those of the first, which nobody reads."""
        return tuple(torch.stack([self.part(name, max(task, 0)) for task in tasks]) for name in self.parts)

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """As they are drawn."""
        shapes = (self.num_new, self.hidden_size), (self.condition_rank, self.hidden_size)
        return {"keys": shapes[0], "into": shapes[1], "out_of": shapes[1][::-1]}
