"""A top-k router per task and site, as LLaVA-CMoE has it: a token's state in, a gate over the site's experts out.

Unlike the usual growing router, a router is never widened: task t's weight keeps the rows of the E_t experts that it
was trained over, so nothing learned later can move its gate, and what it costs does not grow with tasks either.
Shape letters: B batch, T tokens, D hidden, E experts, K tasks mixed for one sample, C top-k slots of a token,
N routers; S is B (images or patches, where rows are these), or 1 where one plan serves the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.init import linear_init
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.base import Gate, Router
from llava_cmoe.experts.routers.exact import exact_logits

RouterStart = Callable[[Tensor], Tensor]
"""From drawn rows (E, D) to the rows that a new router starts with."""


class TaskRouters(Router):
    """One router per task for one site, as parameters `task_0`, `task_1`, ... of shape (E_t, D) in float32.

    Attributes:
        known: per task the experts that its router knows, ascending: those of its rows.
    """

    def __init__(self, hidden_size: int, top_k: int) -> None:
        """No routers yet."""
        super().__init__()
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.known: list[tuple[int, ...]] = []
        self.num_frozen = 0

    def __len__(self) -> int:
        """Tasks that have a router here."""
        return len(self.known)

    def weight(self, task: int) -> Tensor | None:
        """Weight (E_t, D) of one task's router, None where it knows no expert."""
        weight: Tensor | None = getattr(self, f"task_{task}")
        return weight

    def rows(self, task: int) -> dict[int, Tensor]:
        """One task's router by expert: the row (D,) of each that it knows."""
        weight_ED = self.weight(task)
        return {} if weight_ED is None else dict(zip(self.known[task], weight_ED.detach(), strict=True))

    def add(self, weight_ED: Tensor | None, ids: Sequence[int] | None = None) -> None:
        """Append the next task's router, trainable; None for one that knows no expert (empty tensors break ZeRO).

        `ids` are the experts of the rows, ascending; those from 0 on where they are not named.
        """
        num_known = 0 if weight_ED is None else len(weight_ED)
        parameter = None if weight_ED is None else nn.Parameter(weight_ED.float())
        self.register_parameter(f"task_{len(self)}", parameter)
        self.known.append(tuple(range(num_known) if ids is None else ids))

    def add_task(
        self,
        ids: Sequence[int],
        device: torch.device,
        generator: torch.Generator,
        start: RouterStart | None = None,
    ) -> None:
        """Append the next task's router over some experts, drawn as `nn.Linear` draws its weight.

        Every site gets one per task, so that router numbers are task indices, also where no expert was added or exists.

        Args:
            ids: the experts, ascending.
            device: where the router is to be.
            generator: draws them.
            start: makes of drawn rows those that learning starts with; these themselves where absent.
        """
        weight_ED = linear_init((len(ids), self.hidden_size), generator)
        if start is not None and ids:
            weight_ED = start(weight_ED)
        self.add(weight_ED.to(device) if ids else None, ids)

    def freeze(self) -> None:
        """Train none of the routers any more."""
        self.requires_grad_(False)
        self.num_frozen = len(self)

    def discard_trainable(self) -> None:
        """Forget the routers added since the last `freeze()`."""
        while len(self) > self.num_frozen:
            self.known.pop()
            delattr(self, f"task_{len(self)}")

    def state_of(self, task: int) -> dict[str, Tensor]:
        """The task's weight as `router`, and `router_ids` where these are not all experts that there were.

        Whoever adds experts knows them, so what there was is what is known up to this task. Nothing for a router that
        knows no expert.
        """
        weight_ED, ids = self.weight(task), self.known[task]
        if weight_ED is None:
            return {}
        num_experts = 1 + max(max(known, default=-1) for known in self.known[: task + 1])
        named = {} if ids == tuple(range(num_experts)) else {"router_ids": torch.tensor(ids)}
        return {"router": weight_ED.detach().to("cpu", copy=True), **named}

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """A row per expert, of all that there are where none is named.

        Raises:
            ValueError: experts are named that the site has not, or not in ascending order.
        """
        named = given.get("router_ids")
        if named is None:
            return {"router": (num_experts, self.hidden_size)} if num_experts else {}
        ids = named.flatten().tolist()
        if ids != sorted(set(ids)) or not ids or ids[0] < 0 or ids[-1] >= num_experts:
            raise ValueError(
                f"router_ids: {ids}; a router names experts of the {num_experts} that there are, ascending; "
                "restore tasks in the order they were learned"
            )
        return {"router": (len(ids), self.hidden_size), "router_ids": (len(ids),)}

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Append the task's weight."""
        weight_ED, named = tensors.get("router"), tensors.get("router_ids")
        self.add(
            None if weight_ED is None else weight_ED.to(device, copy=True), None if named is None else named.tolist()
        )

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        """The gate of every token under the plan, over the experts that any router in the plan knows.

        A token's top k (fewer where its router knows fewer) are renormalised: the softmax over all experts, cut to the
        top k and divided by its sum, equals the softmax over the top k logits, which is what is computed.
        """
        plan = forward_pass.plan
        if plan.max_task >= len(self):
            raise ValueError(
                f"the route plan names task {plan.max_task}, but {len(self)} tasks have routers here; add one per task"
            )
        ids = self._known_to(plan)
        if not ids:
            return None
        # Outside autocast and in float32: a bf16 softmax ties and flips neighbours in the top k.
        with torch.autocast(h_BTD.device.type, enabled=False):
            logits_BTKE, known_SKE, weights_SK = self._under(forward_pass, ids, h_BTD)
            # Finite: with -inf, a row that knows no expert (task -1) would be 0/0, and NaN in backward.
            logits_BTKE = logits_BTKE.masked_fill(~known_SKE.unsqueeze(1), torch.finfo(torch.float32).min)
            # A stable sort, as torch.topk leaves the order of ties open: among equals the oldest expert wins.
            sorted_BTKE, order_BTKE = logits_BTKE.sort(dim=-1, descending=True, stable=True)
            top_BTKC = order_BTKE[..., : self.top_k]
            share_BTKC = sorted_BTKE[..., : self.top_k].softmax(dim=-1)
            gate_BTKE = torch.zeros_like(logits_BTKE).scatter(-1, top_BTKC, share_BTKC) * known_SKE.unsqueeze(1)
            gate_BTE = (gate_BTKE * weights_SK[:, None, :, None]).sum(dim=2)
        slots_BTC = top_BTKC[:, :, 0] if top_BTKC.shape[2] == 1 else None
        alone = len(ids) == 1  # a softmax over one expert is 1
        return Gate(gate_BTE, ids, slots_BTC, ids, logits_BTKE, top_BTKC, known_SKE, weights_SK, fixed=alone)

    def _known_to(self, plan: RoutePlan) -> tuple[int, ...]:
        """The experts that any router in the plan knows, ascending; worked out once per plan.

        Nothing else is computed: an old task's arithmetic keeps its shapes, hence its bits, whatever is learned later.
        """
        if len(plan.distinct) == 1:
            return self.known[plan.max_task] if plan.max_task >= 0 else ()
        if id(self) not in plan.known:
            tasks = [task for task in plan.distinct if task >= 0]
            plan.known[id(self)] = tuple(sorted({expert for task in tasks for expert in self.known[task]}))
        return plan.known[id(self)]

    def _under(self, forward_pass: ForwardPass, ids: Sequence[int], h_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the routers the plan names, the experts they know (S, K, E), and the plan's weights (S, K)."""
        plan = forward_pass.plan
        if plan.tasks_BK.numel() == 1:  # one task for all: its weight as it is, nothing stacked or gathered
            weight_ED = self.weight(plan.max_task)
            assert weight_ED is not None, "a router that knows experts has a weight"
            known_SKE = weight_ED.new_ones(1, 1, len(weight_ED), dtype=torch.bool)
            return self._logits(h_BTD, weight_ED[None, None]), known_SKE, plan.weights_BK
        tasks_SK, weights_SK = forward_pass.rows()
        if forward_pass.sample_I is not None:
            weight_NED, known_NE, row_SK = self._stacked(plan.distinct, ids, tasks_SK)
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
            weight_NED, known_NE, row_SK = self._stacked(plan.distinct, ids, tasks_SK)
            resolved |= {weights: weight_NED[row_SK], known: known_NE[row_SK]}
        return self._logits(h_BTD, resolved[weights]), resolved[known], weights_SK

    def _stacked(self, tasks: Sequence[int], ids: Sequence[int], tasks_SK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (N, E, D) of a plan's routers, the experts they know (N, E), and which of them each sample is given.

        All are over the same experts. Task -1, and a task from before the site had experts, knows nothing.
        """
        column_of = {expert: column for column, expert in enumerate(ids)}
        weight_NED = torch.zeros(len(tasks), len(ids), self.hidden_size, device=tasks_SK.device)
        known_NE = torch.zeros(len(tasks), len(ids), dtype=torch.bool, device=tasks_SK.device)
        for row, task in enumerate(tasks):
            weight_ED = self.weight(task) if task >= 0 else None
            if weight_ED is not None:
                columns_E = torch.tensor([column_of[one] for one in self.known[task]], device=tasks_SK.device)
                weight_NED[row, columns_E], known_NE[row, columns_E] = weight_ED, True
        row_SK = torch.searchsorted(torch.tensor(tasks, device=tasks_SK.device), tasks_SK)
        return weight_NED, known_NE, row_SK

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
