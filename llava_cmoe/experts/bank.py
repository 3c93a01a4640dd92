"""The experts of one site: stacked LoRA experts, and their mixture on top of the frozen linears.

    h_BTD, input of the site (say, an FFN)
      |
      +---> router: whose turn it is, the plan says ------> gate_BTE, a weight per token and expert
      |                                                         |
      |     each linear of the site                             |  one gate for all of them
      +---> x_BTI ---------- W0, frozen, of any class ----------|------------------- + ---> y_BTO
              |                                                 v                    |
              +--- [A_1 .. A_E]: I -> E*R ----------------- times gate --- [B_1 .. B_E]: E*R -> O

    y_j = W0 x_j + sum_e gate_je * (alpha / rank) * B_e A_e x_j

What is different from the textbook: no loop over experts. A sum over experts is the inner sum of a matrix product, so
with the experts stacked along the concatenated rank E*R their mixture is two matrix products with the gate in between.
Where the experts are so many that dispatching tokens pays, these become grouped products (`grouped.py`). Every expert
takes part on every process, so no collective waits for one that does not.

Experts have ids, the columns of the gate, which never change. They lie in two blocks, the frozen and the trainable
ones: an optimizer holds all of a block or nothing of it. A column whose expert is in no block adds nothing (a null
expert, or one that was removed).

What the gate says is `routers/`'s; where banks sit in the model is `surgery.py`; what grows when is the method's.
Shape letters: B batch, T tokens, D hidden, E experts, R rank, I and O input and output width of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava_cmoe.backbones.sites import Site
from llava_cmoe.experts.context import RouteContext
from llava_cmoe.experts.init import linear_init
from llava_cmoe.experts.routers.base import Gate, Router
from llava_cmoe.experts.stack import LoraPair, StackedExperts, stack_name


class ExpertBank(nn.Module):
    """A frozen attention block, FFN or linear, the experts on its linears, and the router whose gate they share."""

    anchor: Tensor
    router: Router

    def __init__(
        self,
        site: Site,
        frozen: nn.Module,
        context: RouteContext,
        make_router: Callable[[int], Router],
        *,
        rank: int,
        alpha: float,
        dtype: torch.dtype,
    ) -> None:
        """A bank without experts around the module found at `site`; the linears in it are wrapped by surgery.

        `make_router` is called with the width of the site's input.
        """
        super().__init__()
        self.site, self.frozen, self.context, self.rank, self.alpha = site, frozen, context, rank, alpha
        linears: list[Any] = [frozen.get_submodule(path) for path in site.linears]
        self.experts = nn.ModuleDict()
        for path, linear in zip(site.linears, linears, strict=True):
            self.experts[stack_name(path)] = StackedExperts(linear.in_features, linear.out_features)
        self.hidden_size: int = linears[0].in_features
        self.router = make_router(self.hidden_size)
        # New experts and routers are made where this is: it follows `.to()`, also while the bank is empty.
        self.register_buffer("anchor", torch.zeros(1, dtype=dtype, device=linears[0].weight.device), persistent=False)
        self._gate: Gate | None = None

    def forward(self, *args: Any, **named: Any) -> Any:
        """What the frozen module returns, its linears carrying the experts under the plan in use.

        The site's input is the first argument, or `hidden_states`. Patches of several pictures that lie in one
        sequence, (T, D), are rows of one token each.
        """
        h_BTD = input_of(args, named)
        self._gate = self._decide(h_BTD if h_BTD.ndim == 3 else h_BTD.unsqueeze(1))
        try:
            return self.frozen(*args, **named)
        finally:
            self._gate = None

    def delta(self, linear: str, x_BTI: Tensor) -> Tensor | None:
        """What the experts add to a linear's output; None where the plan wants none, and nothing is computed then."""
        if self._gate is None:
            return None
        flat = x_BTI.ndim == 2
        found: Tensor | None = self.experts[linear](
            x_BTI.unsqueeze(1) if flat else x_BTI, self._gate.gate_BTE, self._gate.ids, self._gate.slots_BTC
        )
        return found.squeeze(1) if flat and found is not None else found

    def _decide(self, h_BTD: Tensor) -> Gate | None:
        """The router's gate, times alpha / rank (here, once per site)."""
        device = h_BTD.device
        of_images = self.site.of_images
        running = self.context.image_pass(device, len(h_BTD)) if of_images else self.context.forward_pass(device)
        if running is None or self.num_experts == 0:
            return None
        try:
            gate: Gate | None = self.router(h_BTD, running)
        except ValueError as error:
            raise ValueError(f"{self.site.name}: {error}") from error
        if gate is None:
            return None
        if self.context.observation is not None:
            each = gate._replace(gate_BTE=gate.gate_BTE.expand(*h_BTD.shape[:2], -1))  # where tokens share one
            counts_E, probability_E = each.counts(running.mask_BT), each.probability(running.mask_BT)
            self.context.observation.add(self.site.name, counts_E, probability_E, gate.counted)
        return gate._replace(gate_BTE=gate.gate_BTE * (self.alpha / self.rank)) if gate.gate_BTE.shape[-1] else None

    @property
    def stacks(self) -> dict[str, StackedExperts]:
        """Stacked experts per linear."""
        return {key: cast(StackedExperts, module) for key, module in self.experts.items()}

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of the site's experts, ascending."""
        return tuple(sorted(expert for block in next(iter(self.stacks.values())).blocks for expert in block.ids))

    @property
    def trainable_ids(self) -> tuple[int, ...]:
        """Ids of the experts that an optimizer made now would hold."""
        trainable = next(iter(self.stacks.values())).trainable
        return () if trainable is None else trainable.ids

    @property
    def num_experts(self) -> int:
        """Experts of the site, frozen and trainable."""
        return sum(len(block.ids) for block in next(iter(self.stacks.values())).blocks)

    def grow(
        self,
        num: int,
        *,
        generator: torch.Generator,
        init_from: Mapping[str, LoraPair] | None = None,
        noise: float = 0.0,
        first: int | None = None,
    ) -> None:
        """Add trainable experts: LoRA's init (A random, B = 0: no effect yet), or copies of `expert(i, ...)`.

        They are copies of one expert or of as many, and differ from it, and from each other, by `noise` standard
        deviations. `first` is the id of the first one; they follow the newest where it is absent.
        """
        start = max(self.ids, default=-1) + 1 if first is None else first
        for key, stack in self.stacks.items() if num else ():
            if init_from is None:
                a_ERI = linear_init((num, self.rank, stack.d_in), generator)
                pair = LoraPair(a_ERI, torch.zeros(num, stack.d_out, self.rank))
            else:
                pair = init_from[key].copies(num, noise, generator)
            stack.add(range(start, start + num), pair, like=self.anchor)

    def expert(self, *places: int) -> dict[str, LoraPair]:
        """A copy per linear of the experts at these places in the order of ids, to start new ones from; -1: newest."""
        ids = self.ids
        return {key: stack.read([ids[place] for place in places]) for key, stack in self.stacks.items()}

    def freeze(self, ids: Iterable[int] | None = None) -> None:
        """End a task: the experts named (all where none is) and what the router learned change no more."""
        chosen = None if ids is None else tuple(ids)
        for stack in self.stacks.values():
            stack.freeze(chosen)
        self.router.freeze()

    def drop(self, ids: Iterable[int]) -> None:
        """Remove experts for good; their columns of the gate add nothing from here on."""
        gone = tuple(ids)
        for stack in self.stacks.values():
            stack.drop(gone)

    def discard_trainable(self) -> None:
        """Forget the experts and routers since the last `freeze()`: probes."""
        self.drop(self.trainable_ids)
        self.router.discard_trainable()


def input_of(args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """A site's input among the arguments that it is called with; attention is called with names."""
    found: Tensor = args[0] if args else named["hidden_states"]
    return found


class ExpertLinear(nn.Module):
    """A frozen linear of whatever class, plus what the bank adds to its output."""

    def __init__(self, frozen: nn.Module, delta: Callable[[Tensor], Tensor | None]) -> None:
        """`delta` is the bank's, for this linear: a function, so that the bank stays in one place of the tree."""
        super().__init__()
        self.frozen = frozen
        self.delta = delta

    def forward(self, x_BTI: Tensor) -> Tensor:
        """The frozen output, untouched where the plan wants no experts; the sum is in the frozen output's dtype."""
        y_BTO: Tensor = self.frozen(x_BTI)
        delta_BTO = self.delta(x_BTI)
        return y_BTO if delta_BTO is None else y_BTO + delta_BTO.to(y_BTO.dtype)
