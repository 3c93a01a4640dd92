"""MoE-Adapters' routers of one site: of each task a router that gives every sample its top k experts of a fixed pool.

    z = c R_t^T + eps * (softplus(c N_t^T) + 0.01), eps ~ N(0, 1), while task t learns     z = c R_t^T afterwards
    gate = softmax over the k largest

c is a feature of the prompt that the plan carries, so no expert and no batch mate can move a route. As in noisy top-k
gating (arXiv 1701.06538) R and N begin at zero: the noise alone chooses until something is learned.
Shape letters: B batch, D width of the feature, E experts, N tasks with a router, K tasks mixed for one sample; S is B,
or 1 where one plan serves the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.routers.additive import FEATURE
from llava_cmoe.experts.routers.base import Gate, Router
from llava_cmoe.experts.routers.exact import exact_logits

LEAST_NOISE = 1e-2


class SampleRouters(Router):
    """The newest task's parameters `weight` and `noise`, each (E, D), and the frozen weights of all before."""

    frozen_NED: Tensor
    weight: nn.Parameter | None
    noise: nn.Parameter | None

    def __init__(self, width: int, top_k: int) -> None:
        """No task yet; `width` is the feature's."""
        super().__init__()
        self.width, self.top_k = width, top_k
        self.register_parameter("weight", None)
        self.register_parameter("noise", None)
        self.register_buffer("frozen_NED", torch.empty(0, 0, width), persistent=False)

    @property
    def num_tasks(self) -> int:
        """Tasks that have a router here."""
        return len(self.frozen_NED) + (self.weight is not None)

    def add_task(self, num_experts: int, device: torch.device) -> None:
        """Begin the next task's router, at zero."""
        self.weight, self.noise = (nn.Parameter(torch.zeros(num_experts, self.width, device=device)) for _ in range(2))

    def gate_of_newest(self, feature_BD: Tensor, noisy: bool) -> Tensor:
        """Gate (B, E) of the task that is being learned."""
        assert self.weight is not None and self.noise is not None, "a task is being learned"
        logits_BE = exact_logits(feature_BD, self.weight)
        if noisy:
            scale_BE = softplus(exact_logits(feature_BD, self.noise)) + LEAST_NOISE
            logits_BE = logits_BE + torch.randn_like(logits_BE) * scale_BE
        return self._top(logits_BE)

    def gate(self, feature_BD: Tensor, tasks_SK: Tensor, weights_SK: Tensor) -> Tensor:
        """Gate (B, E) of frozen tasks, mixed by the plan's weights; none for task -1."""
        weight_SKED = self.frozen_NED[tasks_SK.clamp_min(0)]
        logits_BKE = exact_logits(feature_BD[:, None, None], weight_SKED).squeeze(2)
        known_SK = weights_SK.masked_fill(tasks_SK < 0, 0)
        return (self._top(logits_BKE) * known_SK.unsqueeze(-1)).sum(dim=1)

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """One gate per sample (B, 1, E), decided once per prompt."""
        plan = forward_pass.plan
        if plan.max_task < 0:
            return None
        if plan.max_task >= self.num_tasks:
            raise ValueError(f"the route plan names task {plan.max_task}, but {self.num_tasks} tasks have routers here")
        key = f"gate of {id(self)}"
        if forward_pass.is_prefill:
            feature_BD = plan.decided[FEATURE]
            with torch.autocast(h_BTD.device.type, enabled=False):
                if plan.max_task == len(self.frozen_NED):
                    gate_BE = self.gate_of_newest(feature_BD, noisy=self.training)
                else:
                    gate_BE = self.gate(feature_BD, *forward_pass.rows())
            plan.decided[key] = gate_BE.unsqueeze(1)
        return Gate(plan.decided[key])

    def state_of(self, task: int) -> dict[str, Tensor]:
        """The newest task's parameters; to be read before they are frozen."""
        assert self.weight is not None and self.noise is not None and task == self.num_tasks - 1, "a task just learned"
        return {name: getattr(self, name).detach().to("cpu", copy=True) for name in ("weight", "noise")}

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """A row per expert, twice."""
        return dict.fromkeys(("weight", "noise"), (num_experts, self.width))

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the next task's parameters back."""
        self.weight, self.noise = (nn.Parameter(tensors[name].to(device, copy=True)) for name in ("weight", "noise"))

    def freeze(self) -> None:
        """Keep the newest task's weight for good; its noise is not needed any more."""
        if self.weight is not None:
            weight_1ED = self.weight.detach().unsqueeze(0)
            self.frozen_NED = (
                torch.cat([self.frozen_NED.to(weight_1ED), weight_1ED]) if self.num_tasks > 1 else weight_1ED
            )
            self.weight = self.noise = None

    def discard_trainable(self) -> None:
        """Forget the task that is not frozen yet."""
        self.weight = self.noise = None

    def _top(self, logits_E: Tensor) -> Tensor:
        """Softmax (..., E) over the k largest of the last axis; among equals the oldest expert wins."""
        sorted_E, order_E = logits_E.sort(dim=-1, descending=True, stable=True)
        share_C = sorted_E[..., : self.top_k].softmax(dim=-1)
        return torch.zeros_like(logits_E).scatter(-1, order_E[..., : self.top_k], share_C)
