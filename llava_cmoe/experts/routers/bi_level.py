"""CaRE's bi-level routing at one site: first the surest routers, then the best experts of each.

    c       = mean state of the prompt at this site, layer-normalised
    level 1   the M tasks whose perceptron, softmax(C_n c) over the task's pseudo-classes, has the lowest entropy; while
              a task learns, its own is always one of them
    level 2   of each chosen router R_n c, over the experts of tasks 1 to n, the K best, softmax over these
    gate    = the sum of the chosen routers' gates; the shared expert, column 0, takes part at full weight

A sample is decided once per site, from its prompt alone.
Shape letters: B batch, T tokens, D hidden, N tasks, C classes, E experts (column 0 of a gate is the shared one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.init import linear_init
from llava_cmoe.experts.routers.base import Gate
from llava_cmoe.experts.routers.exact import exact_logits
from llava_cmoe.experts.routers.mid_depth import pooled
from llava_cmoe.experts.routers.task_parts import TaskParts

LEAST = torch.finfo(torch.float32).min


class BiLevelRouter(TaskParts):
    """Of task t a perceptron (C, D) and a router (t + 1, D)."""

    parts = ("perceptron", "router")

    def __init__(self, hidden_size: int, num_classes: int, num_routers: int, num_experts: int) -> None:
        """No task yet; M routers decide, and each gives K experts."""
        super().__init__()
        self.hidden_size, self.num_classes = hidden_size, num_classes
        self.num_routers, self.num_experts = num_routers, num_experts

    def add_task(self, device: torch.device, generator: torch.Generator) -> None:
        """Begin the next task's perceptron and router, drawn as `nn.Linear` draws its weight."""
        perceptron_CD = linear_init((self.num_classes, self.hidden_size), generator)
        router_ED = linear_init((self.num_tasks + 1, self.hidden_size), generator)
        self.add({"perceptron": perceptron_CD, "router": router_ED}, device)

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """One gate per sample (B, 1, 1 + E)."""
        if not self.num_tasks:
            return None
        decided, key = forward_pass.plan.decided, f"gate of {id(self)}"
        if forward_pass.is_prefill:
            with torch.autocast(h_BTD.device.type, enabled=False):
                c_BD = pooled(h_BTD, forward_pass.prompt_mask_BT)
                logits_BNC = self._perceptrons(c_BD)
                decided[self.logits_key] = logits_BNC[:, -1]
                decided[key] = self._gate(c_BD, entropy(logits_BNC)).unsqueeze(1)
        return Gate(decided[key])

    @property
    def logits_key(self) -> str:
        """Key of the plan's `decided` under which the newest perceptron's logits (B, C) of the pass are found."""
        return f"classes of {id(self)}"

    def _perceptrons(self, c_BD: Tensor) -> Tensor:
        """Logits (B, N, C) of all tasks' perceptrons."""
        weight_NCD = torch.stack([self.part("perceptron", task) for task in range(self.num_tasks)])
        return exact_logits(c_BD, weight_NCD.flatten(0, 1)).view(len(c_BD), self.num_tasks, self.num_classes)

    def _gate(self, c_BD: Tensor, entropy_BN: Tensor) -> Tensor:
        """Gate (B, 1 + E): the surest routers' best experts, and the shared one."""
        if self.training:  # below any entropy
            entropy_BN = entropy_BN.index_fill(1, torch.tensor([self.num_tasks - 1], device=c_BD.device), -1.0)
        weights = [self.part("router", task) for task in range(self.num_tasks)]
        weight_NED = pad_sequence(weights, batch_first=True)
        known_NE = torch.ones(self.num_tasks, self.num_tasks, dtype=torch.bool, device=c_BD.device).tril()
        logits_BNE = exact_logits(c_BD, weight_NED.flatten(0, 1)).view(len(c_BD), *known_NE.shape)
        sorted_BNE, order_BNE = logits_BNE.masked_fill(~known_NE, LEAST).sort(dim=-1, descending=True, stable=True)
        share_BNK = sorted_BNE[..., : self.num_experts].softmax(dim=-1)
        gate_BNE = torch.zeros_like(logits_BNE).scatter(-1, order_BNE[..., : self.num_experts], share_BNK) * known_NE
        surest_BM = entropy_BN.sort(dim=1, stable=True).indices[:, : self.num_routers]
        chosen_BN = torch.zeros_like(entropy_BN).scatter(1, surest_BM, 1.0)
        return pad((gate_BNE * chosen_BN.unsqueeze(-1)).sum(dim=1), (1, 0), value=1.0)

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """A row per class, and one per task."""
        rows = {"perceptron": self.num_classes, "router": self.num_tasks + 1}
        return {name: (num, self.hidden_size) for name, num in rows.items()}


def entropy(logits_BNC: Tensor) -> Tensor:
    """Entropy (B, N) of each softmax, in units of the largest possible one, so 0 to 1."""
    log_BNC = logits_BNC.log_softmax(dim=-1)
    return -(log_BNC.exp() * log_BNC).sum(dim=-1) / math.log(logits_BNC.shape[-1])
