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
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.init import linear_init
from llava_cmoe.experts.routers.base import Gate, Router
from llava_cmoe.experts.routers.exact import exact_logits
from llava_cmoe.experts.routers.mid_depth import pooled

LEAST = torch.finfo(torch.float32).min


class BiLevelRouter(Router):
    """Task t's parameters as `perceptron_t` (C, D) and `router_t` (t + 1, D)."""

    def __init__(self, hidden_size: int, num_classes: int, num_routers: int, num_experts: int) -> None:
        """No task yet; M routers decide, and each gives K experts."""
        super().__init__()
        self.hidden_size, self.num_classes = hidden_size, num_classes
        self.num_routers, self.num_experts = num_routers, num_experts
        self.num_tasks = self.num_frozen = 0

    def add_task(self, device: torch.device, generator: torch.Generator) -> None:
        """Begin the next task's perceptron and router, drawn as `nn.Linear` draws its weight."""
        perceptron_CD = linear_init((self.num_classes, self.hidden_size), generator)
        self._add(perceptron_CD, linear_init((self.num_tasks + 1, self.hidden_size), generator), device)

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
        weight_NCD = torch.stack([self.get_parameter(f"perceptron_{task}") for task in range(self.num_tasks)])
        return exact_logits(c_BD, weight_NCD.flatten(0, 1)).view(len(c_BD), self.num_tasks, self.num_classes)

    def _gate(self, c_BD: Tensor, entropy_BN: Tensor) -> Tensor:
        """Gate (B, 1 + E): the surest routers' best experts, and the shared one."""
        if self.training:  # below any entropy
            entropy_BN = entropy_BN.index_fill(1, torch.tensor([self.num_tasks - 1], device=c_BD.device), -1.0)
        weights: list[Tensor] = [self.get_parameter(f"router_{task}") for task in range(self.num_tasks)]
        weight_NED = pad_sequence(weights, batch_first=True)
        known_NE = torch.ones(self.num_tasks, self.num_tasks, dtype=torch.bool, device=c_BD.device).tril()
        logits_BNE = exact_logits(c_BD, weight_NED.flatten(0, 1)).view(len(c_BD), *known_NE.shape)
        sorted_BNE, order_BNE = logits_BNE.masked_fill(~known_NE, LEAST).sort(dim=-1, descending=True, stable=True)
        share_BNK = sorted_BNE[..., : self.num_experts].softmax(dim=-1)
        gate_BNE = torch.zeros_like(logits_BNE).scatter(-1, order_BNE[..., : self.num_experts], share_BNK) * known_NE
        surest_BM = entropy_BN.sort(dim=1, stable=True).indices[:, : self.num_routers]
        chosen_BN = torch.zeros_like(entropy_BN).scatter(1, surest_BM, 1.0)
        return pad((gate_BNE * chosen_BN.unsqueeze(-1)).sum(dim=1), (1, 0), value=1.0)

    def _add(self, perceptron_CD: Tensor, router_ED: Tensor, device: torch.device) -> None:
        for name, weight in (("perceptron", perceptron_CD), ("router", router_ED)):
            self.register_parameter(f"{name}_{self.num_tasks}", nn.Parameter(weight.float().to(device, copy=True)))
        self.num_tasks += 1

    def state_of(self, task: int) -> dict[str, Tensor]:
        """The task's parameters."""
        names = ("perceptron", "router")
        return {name: self.get_parameter(f"{name}_{task}").detach().to("cpu", copy=True) for name in names}

    def shapes_of_next(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """A row per class, and one per task."""
        rows = {"perceptron": self.num_classes, "router": self.num_tasks + 1}
        return {name: (num, self.hidden_size) for name, num in rows.items()}

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Append the task's parameters."""
        self._add(tensors["perceptron"], tensors["router"], device)

    def freeze(self) -> None:
        """Train no more what is there."""
        super().freeze()
        self.num_frozen = self.num_tasks

    def discard_trainable(self) -> None:
        """Forget the tasks since the last `freeze()`."""
        while self.num_tasks > self.num_frozen:
            self.num_tasks -= 1
            for name in ("perceptron", "router"):
                delattr(self, f"{name}_{self.num_tasks}")


def entropy(logits_BNC: Tensor) -> Tensor:
    """Entropy (B, N) of each softmax, in units of the largest possible one, so 0 to 1."""
    log_BNC = logits_BNC.log_softmax(dim=-1)
    return -(log_BNC.exp() * log_BNC).sum(dim=-1) / math.log(logits_BNC.shape[-1])
