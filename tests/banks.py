"""What tests do to expert banks: tasks as training would leave them, and a router that is told its gate."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.base import Gate, Router
from llava_cmoe.experts.surgery import ExpertHost

TOKENS = torch.arange(4, 20).view(2, 8)
"""Two samples of text alone."""
BATCH = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}


class Parts(PreTrainedModel):
    """Some modules as one model, to put banks into."""

    config_class = PretrainedConfig

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__(PretrainedConfig())
        for name, module in modules.items():
            self.add_module(name, module)


def add_task(bank: ExpertBank, num_new: int, generator: torch.Generator) -> None:
    """Begin the next task as methods do: new experts without effect yet, and a router over all that there are now."""
    bank.grow(num_new, generator=generator)
    bank.router.add_task(bank.ids, bank.anchor.device, generator)


def train_task(bank: ExpertBank, num_new: int, generator: torch.Generator, bound: float = 0.5) -> None:
    """A task as training would leave it, not frozen yet: new experts that do something, and a router."""
    add_task(bank, num_new, generator)
    for stack in bank.stacks.values():
        if stack.trainable is not None:
            stack.trainable.B.data.uniform_(-bound, bound, generator=generator)


def add_task_that_knows(host: ExpertHost, ids: Sequence[int]) -> None:
    """A frozen task without experts of its own, whose routers know some old ones."""
    generator = torch.Generator().manual_seed(1)
    for bank in host.banks.values():
        bank.router.add_task(ids, bank.anchor.device, generator)
    host.freeze()


class GivenGate(Router):
    """A router that is told its gate, learns nothing, and remembers the passes that it was asked in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate: Gate | None = None
        self.passes: list[ForwardPass] = []

    def forward(self, h_BTD: Tensor, forward_pass: ForwardPass) -> Gate | None:
        self.passes.append(forward_pass)
        return self.gate

    def state_of(self, task: int) -> dict[str, Tensor]:
        return {}

    def shapes_of_next(self, num_experts: int, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {}

    def restore_next(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        pass

    def discard_trainable(self) -> None:
        pass


def trainable_names(module: nn.Module) -> set[str]:
    """Names of the parameters that an optimizer made now would hold."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def logits_under(model: PreTrainedModel, host: ExpertHost, plan: RoutePlan | None) -> Tensor:
    """Logits of two samples of text under a plan."""
    with torch.no_grad(), host.context.use(plan, BATCH):
        logits_BTV: Tensor = model(input_ids=TOKENS).logits
    return logits_BTV


def make_twins(host: ExpertHost, older: int, newer: int) -> str:
    """Make two frozen experts of the first site one and the same; says which site."""
    site, bank = next(iter(host.banks.items()))
    for stack in bank.stacks.values():
        stack.frozen.A.data[newer] = stack.frozen.A.data[older]
        stack.frozen.B.data[newer] = stack.frozen.B.data[older]
    return site


class CountOps(TorchDispatchMode):
    """Counts every operation that reaches the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))
