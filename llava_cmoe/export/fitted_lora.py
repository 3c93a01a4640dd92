"""Experts as LoRA adapters where tokens move the gates: the adapter closest to what the experts do to some rows.

    d_t = [A_1; ..; A_E] x_t             kept: the adapter's A
    y_t = [s B_1 .. s B_E] (g_t * d_t)   what the experts add, g_t the gate of token t, s = alpha / rank
    B'  = argmin sum_t |y_t - B' d_t|^2  =  [s B_1 .. s B_E] M,    M = (sum_t (g_t * d_t) d_t^T) (sum_t d_t d_t^T)^-1

A fixed weight for each expert is an M that is diagonal. Two sums of F x F per linear are all that is kept of the rows.
All tokens count alike, padding apart: answers are read off what the experts made of the prompt.

Measured on one run of `cmoe` (pocket sequence, 60 questions each of two tasks, 200 rows to fit on), share of equal
answers: 15 and 75 % with the mean gate, 23 and 72 % with the best weight of each expert, 77 and 87 % with this. More
rows, or answers' tokens alone, were no better.
Shape letters: B batch, T tokens, E experts, R rank, F the ranks of all experts, N tokens that count, I and O widths.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llava_cmoe.data.batches import Batch
from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.routers.base import Gate
from llava_cmoe.experts.stack import StackedExperts, stack_name
from llava_cmoe.export.lora import Adapter
from llava_cmoe.methods.base import Method

RIDGE = 1e-6
"""Added to the mean square of d: directions that no row shows would have no answer."""


@dataclass
class LinearFit:
    """What is kept of one linear while rows pass: the experts of its gate, and both sums, in float64."""

    experts: tuple[int, ...]
    a_FI: Tensor
    b_OF: Tensor
    gated_FF: Tensor
    plain_FF: Tensor

    @classmethod
    def of(cls, stack: StackedExperts, experts: tuple[int, ...]) -> LinearFit:
        """Nothing seen yet."""
        pair = stack.read(experts)
        a_FI, b_OF = pair.a_ERI.float().flatten(0, 1), pair.b_EOR.float().movedim(0, 1).flatten(1)
        zero_FF = torch.zeros(len(a_FI), len(a_FI), dtype=torch.float64, device=a_FI.device)
        return cls(experts, a_FI, b_OF, zero_FF, zero_FF.clone())

    def add(self, x_NI: Tensor, gate_NE: Tensor) -> None:
        """Take some tokens; the gate is over `experts`, the scale in it."""
        d_NF = (x_NI.float() @ self.a_FI.mT).double()
        rank = len(self.a_FI) // len(self.experts)
        self.gated_FF += (gate_NE.double().repeat_interleave(rank, dim=1) * d_NF).mT @ d_NF
        self.plain_FF += d_NF.mT @ d_NF

    def adapter(self) -> Adapter:
        """The closest one."""
        ridge = RIDGE * self.plain_FF.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        square_FF = self.plain_FF + ridge * torch.eye(len(self.plain_FF), device=self.plain_FF.device)
        mixing_FF = torch.linalg.solve(square_FF, self.gated_FF, left=False)
        return Adapter(self.a_FI, (self.b_OF.double() @ mixing_FF).float())


class SiteFit:
    """Listens to one bank, and fits all of its linears."""

    def __init__(self, bank: ExpertBank) -> None:
        """Nothing heard yet."""
        self.bank = bank
        self.fits: dict[str, LinearFit] = {}
        self._mask_BT: Tensor | None = None

    def listen(self) -> ExitStack:
        """Until it is closed."""
        hooks = ExitStack()
        hooks.callback(self.bank.router.register_forward_hook(self._decided).remove)
        for path in self.bank.site.linears:
            stack = self.bank.stacks[stack_name(path)]
            hooks.callback(stack.register_forward_pre_hook(partial(self._asked, path)).remove)
        return hooks

    def _decided(self, router: nn.Module, args: tuple[Any, ...], gate: Gate | None) -> None:
        self._mask_BT = args[1].mask_BT

    def _asked(self, path: str, stack: StackedExperts, args: tuple[Any, ...]) -> None:
        x_BTI, gate_BTE, ids, _ = args
        columns = list(range(gate_BTE.shape[-1])) if ids is None else list(ids)
        held = tuple(expert for expert in columns if expert in self.bank.ids)
        if not held:
            return
        if path not in self.fits:
            self.fits[path] = LinearFit.of(stack, held)
        assert self.fits[path].experts == held, "a task's experts are the same in every batch"
        shape = x_BTI.shape[:2]
        counts_BT = torch.ones(shape, dtype=torch.bool) if self._mask_BT is None else self._mask_BT.expand(shape)
        held_BTE = gate_BTE[..., [columns.index(expert) for expert in held]].expand(*shape, -1)
        self.fits[path].add(x_BTI[counts_BT], held_BTE[counts_BT])


@torch.no_grad()
def fitted_adapters(method: Method, task: int, rows: Iterable[Batch]) -> dict[str, Adapter]:
    """Module path in the bare backbone to the adapter there, as close as one can be on whole samples of a task.

    Args:
        method: whose experts.
        task: whose gates.
        rows: batches of samples with their labels, which routers that pool a prompt need.
    """
    assert method.host is not None, "a method with banks"
    sites = {site: SiteFit(bank) for site, bank in method.host.banks.items()}
    with ExitStack() as listening:
        for fit in sites.values():
            listening.enter_context(fit.listen())
        for batch in rows:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            with method.answering(batch, torch.full((len(batch["input_ids"]),), task)):
                method.model.base_model(**inputs, use_cache=False)
    return {
        f"{site}.{path}".removesuffix("."): fit.adapter()
        for site, of_site in sites.items()
        for path, fit in of_site.fits.items()
    }
