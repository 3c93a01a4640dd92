"""A top-k router per task and site, as LLaVA-CMoE has it: a token's state in, a gate over the site's experts out.

Unlike the usual growing router, a router is never widened: task t's weight keeps the E_t rows it was trained with, so
nothing learned later can move its gate.
Shape letters: B batch, T tokens, D hidden, E experts, K tasks mixed for one sample, C top-k slots of a token,
N routers; S is B (images or patches, where rows are these), or 1 where one plan serves the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.init import linear_init
from llava_cmoe.experts.routers.base import Gate, Router
from llava_cmoe.experts.routers.exact import exact_logits

RouterStart = Callable[[Tensor], Tensor]
"""From drawn rows (E, D) to the rows that a new router starts with."""


class TaskRouters(Router):
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

    def add_task(
        self,
        num_experts: int,
        device: torch.device,
        generator: torch.Generator,
        start: RouterStart | None = None,
    ) -> None:
        """Append the next task's router over `num_experts`, drawn as `nn.Linear` draws its weight.

        Every site gets one per task, so that router numbers are task indices, also where no expert was added or exists.

        Args:
            num_experts: rows.
            device: where the router is to be.
            generator: draws them.
            start: makes of drawn rows those that learning starts with; these themselves where absent.
        """
        weight_ED = linear_init((num_experts, self.hidden_size), generator)
        if start is not None and num_experts:
            weight_ED = start(weight_ED)
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

    def discard_trainable(self) -> None:
        """Forget the routers added since the last `freeze()`."""
        while len(self) > self.num_frozen:
            self.widths.pop()
            delattr(self, f"task_{len(self)}")

    def state_of(self, task: int) -> dict[str, Tensor]:
        """The task's weight as `router`; nothing for a site without experts."""
        weight_ED = self.weight(task)
        return {} if weight_ED is None else {"router": weight_ED.detach().to("cpu", copy=True)}

    def shapes_of_next(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """A row per expert."""
        return {"router": (num_experts, self.hidden_size)} if num_experts else {}

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Append the task's weight."""
        weight_ED = tensors.get("router")
        self.add(None if weight_ED is None else weight_ED.to(device, copy=True))

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """The gate of every token under the plan; all computed at width E of the plan's latest task.

        A token's top k (fewer where its router knows fewer) are renormalised: the softmax over all experts, cut to the
        top k and divided by its sum, equals the softmax over the top k logits, which is what is computed.
        """
        latest = forward_pass.plan.max_task
        if latest >= len(self):
            raise ValueError(
                f"the route plan names task {latest}, but {len(self)} tasks have routers here; add one per task"
            )
        if latest < 0 or self.widths[latest] == 0:
            return None
        # Outside autocast and in float32: a bf16 softmax ties and flips neighbours in the top k.
        with torch.autocast(h_BTD.device.type, enabled=False):
            logits_BTKE, known_SKE, weights_SK = self._under(forward_pass, h_BTD)
            # Finite: with -inf, a row that knows no expert (task -1) would be 0/0, and NaN in backward.
            logits_BTKE = logits_BTKE.masked_fill(~known_SKE.unsqueeze(1), torch.finfo(torch.float32).min)
            # A stable sort, as torch.topk leaves the order of ties open: among equals the oldest expert wins.
            sorted_BTKE, order_BTKE = logits_BTKE.sort(dim=-1, descending=True, stable=True)
            top_BTKC = order_BTKE[..., : self.top_k]
            share_BTKC = sorted_BTKE[..., : self.top_k].softmax(dim=-1)
            gate_BTKE = torch.zeros_like(logits_BTKE).scatter(-1, top_BTKC, share_BTKC) * known_SKE.unsqueeze(1)
            gate_BTE = (gate_BTKE * weights_SK[:, None, :, None]).sum(dim=2)
        return Gate(gate_BTE, 0, logits_BTKE, top_BTKC, known_SKE, weights_SK)

    def _under(self, forward_pass: ForwardPass, h_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the routers the plan names, the experts they know (S, K, E), and the plan's weights (S, K)."""
        plan = forward_pass.plan
        newest = self.weight(plan.max_task)
        assert newest is not None, "a task of this width has a weight"
        if plan.tasks_BK.numel() == 1:  # one task for all: its weight as it is, nothing stacked or gathered
            known_SKE = newest.new_ones(1, 1, len(newest), dtype=torch.bool)
            return self._logits(h_BTD, newest[None, None]), known_SKE, plan.weights_BK
        tasks_SK, weights_SK = forward_pass.rows()
        if forward_pass.sample_I is not None:
            weight_NED, known_NE, row_SK = self._stacked(plan.distinct, newest, tasks_SK)
            if h_BTD.shape[1] > 1:
                return self._logits(h_BTD, weight_NED[row_SK]), known_NE[row_SK], weights_SK
            # Rows are patches, thousands of them: a weight for each would be larger than the logits of all routers.
            all_BNE = self._logits(h_BTD, weight_NED[None])[:, 0]
            logits_BTKE = all_BNE[torch.arange(len(h_BTD), device=h_BTD.device)[:, None], row_SK].unsqueeze(1)
            return logits_BTKE, known_NE[row_SK], weights_SK
        weights, known = f"weights of {id(self)}", f"known of {id(self)}"
        # Once per plan: decoding reads what the prefill has stacked. Not where a graph would hang on it.
        resolved = {} if torch.is_grad_enabled() else plan.decided
        if weights not in resolved:
            weight_NED, known_NE, row_SK = self._stacked(plan.distinct, newest, tasks_SK)
            resolved |= {weights: weight_NED[row_SK], known: known_NE[row_SK]}
        return self._logits(h_BTD, resolved[weights]), resolved[known], weights_SK

    def _stacked(self, tasks: Sequence[int], newest: Tensor, tasks_SK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (N, E, D) of a plan's routers, the experts they know (N, E), and which of them each sample is given.

        All are as wide as the newest one. Task -1, and a task from before the site had experts, knows nothing.
        """
        nothing = newest.new_zeros(0, self.hidden_size)
        stored = [self.weight(task) if task >= 0 else None for task in tasks]
        rows = [nothing if weight is None else weight for weight in stored]
        known = [torch.ones_like(row[:, 0], dtype=torch.bool) for row in rows]
        row_SK = torch.searchsorted(torch.tensor(tasks, device=tasks_SK.device), tasks_SK)
        return pad_sequence(rows, batch_first=True), pad_sequence(known, batch_first=True), row_SK

    def _logits(self, h_BTD: Tensor, weight_SKED: Tensor) -> Tensor:
        """Logits (B, T, K, E) of one plan for all samples, or of one for each."""
        num_plans, num_mixed, num_experts, _ = weight_SKED.shape
        if num_plans not in (1, len(h_BTD)):
            raise ValueError(
                f"the route plan is for {num_plans} samples, the batch has {len(h_BTD)}; give it one row per sample"
            )
        weight_SFD = weight_SKED.flatten(1, 2)  # F = K * E
        logits_BTF = exact_logits(h_BTD, weight_SFD[0] if num_plans == 1 else weight_SFD)
        return logits_BTF.view(*h_BTD.shape[:2], num_mixed, num_experts)
