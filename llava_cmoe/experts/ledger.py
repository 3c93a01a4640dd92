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
class Trained:
    """What a task trains, at one site or over all: experts and router."""

    experts: Size = Size()
    router: Size = Size()

    @property
    def total(self) -> Size:
        """Experts and router together."""
        return self.experts + self.router

    def __add__(self, other: Trained) -> Trained:
        """Sum over sites or tasks."""
        return Trained(self.experts + other.experts, self.router + other.router)


def expert_parameters(bank: ExpertBank) -> int:
    """Parameters of one expert of a site: rank * sum over its linears of (d_in + d_out)."""
    return bank.rank * sum(stack.d_in + stack.d_out for stack in bank.stacks.values())


def trained_per_site(banks: Mapping[str, ExpertBank]) -> dict[str, Trained]:
    """What the task that is being learned trains, by site name; to be read before the banks are frozen."""
    return {site: Trained(trainable(bank.experts), trainable(bank.router)) for site, bank in banks.items()}


def trained(banks: Mapping[str, ExpertBank]) -> Trained:
    """The same over all sites: what the task's directory stores."""
    return sum(trained_per_site(banks).values(), start=Trained())


def stored(banks: Mapping[str, ExpertBank]) -> Size:
    """All experts and routers of all tasks so far."""
    grown = [module for bank in banks.values() for module in (bank.experts, bank.router)]
    return size_of(parameter for module in grown for parameter in module.parameters())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer made now would hold, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def trainable(model: nn.Module) -> Size:
    """The size of that."""
    return size_of(trained_parameters(model).values())


def size_of(tensors: Iterable[Tensor]) -> Size:
    """Parameters and bytes of some tensors."""
    sizes = (Size(tensor.numel(), tensor.numel() * tensor.element_size()) for tensor in tensors)
    return sum(sizes, start=Size())
