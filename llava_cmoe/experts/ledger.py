"""Parameter and byte counts of what was learned: per task, per site, trainable now, stored.

Counts only; who reports them is the method's and the report's. The closed formula stands beside the counts: LoRA of
rank r on an FFN's gate, up and down projections is r * 3 * (hidden + inner), 45,312 r in LLaMA-7B (4,096 and 11,008).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from llava_cmoe.experts.bank import ExpertBank


@dataclass(frozen=True)
class Size:
    """A number of parameters and the bytes they take."""

    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: Size) -> Size:
        """Sum of both counts."""
        return Size(self.parameters + other.parameters, self.bytes + other.bytes)


@dataclass(frozen=True)
class Added:
    """What one task added, at one site or over all: its new experts and its router."""

    experts: Size = Size()
    router: Size = Size()

    @property
    def total(self) -> Size:
        """Experts and router together."""
        return self.experts + self.router

    def __add__(self, other: Added) -> Added:
        """Sum over sites or tasks."""
        return Added(self.experts + other.experts, self.router + other.router)


def expert_parameters(bank: ExpertBank) -> int:
    """Parameters of one expert of a site: rank * sum over its linears of (d_in + d_out)."""
    return bank.rank * sum(stack.d_in + stack.d_out for stack in bank.stacks.values())


def added_per_site(banks: Mapping[str, ExpertBank], task: int) -> dict[str, Added]:
    """What one task added, by site name."""
    return {site: _added(bank, task) for site, bank in banks.items()}


def added(banks: Mapping[str, ExpertBank], task: int) -> Added:
    """What one task added over all sites: what its directory stores."""
    return sum(added_per_site(banks, task).values(), start=Added())


def stored(banks: Mapping[str, ExpertBank]) -> Size:
    """All experts and routers of all tasks so far."""
    grown = [module for bank in banks.values() for module in (bank.experts, bank.routers)]
    return size_of(parameter for module in grown for parameter in module.parameters())


def trainable(model: nn.Module) -> Size:
    """What an optimizer made now would hold."""
    return size_of(parameter for parameter in model.parameters() if parameter.requires_grad)


def size_of(tensors: Iterable[Tensor]) -> Size:
    """Parameters and bytes of some tensors."""
    sizes = (Size(tensor.numel(), tensor.numel() * tensor.element_size()) for tensor in tensors)
    return sum(sizes, start=Size())


def _added(bank: ExpertBank, task: int) -> Added:
    num_parameters = len(bank.routers.new_experts(task)) * expert_parameters(bank)
    weight_ED = bank.routers.weight(task)
    return Added(
        experts=Size(num_parameters, num_parameters * bank.anchor.element_size()),
        router=Size() if weight_ED is None else size_of([weight_ED]),
    )
