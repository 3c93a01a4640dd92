"""The variants whose costs are compared: plain LoRA, experts here, and experts in the form that this field usually has.

`LoopMoe` is a reference written for this comparison: each linear has a dense gate of its own and a Python loop over its
experts, as MoE layers on PEFT do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_cmoe.analyses.step_costs import Batch, Variant, plain, sharing
from llava_cmoe.backbones.sites import Site, ffn_sites, linear_sites
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.methods.moelora import MoeLora
from llava_cmoe.settings.methods.cmoe import CmoeSettings
from llava_cmoe.settings.methods.moelora import MoeLoraSettings

RANK = 8
"""Of one expert."""
TOP_K = 2
OLD_EXPERTS = 4
"""Experts of earlier tasks that a task knows, where cost is measured against tasks."""

Build = Callable[[PreTrainedModel], Variant]


def lora(model: PreTrainedModel, rank: int, everywhere: bool = False) -> Variant:
    """Stock PEFT on the LLM's FFNs, or on all of its linears."""
    sites = linear_sites(model) if everywhere else ffn_sites(model)
    targets = [path for site in sites for path in _paths(site)]
    adapted = get_peft_model(sharing(model), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    return Variant(adapted, plain, plain)  # type: ignore[arg-type]  # stands where the model stood


def cmoe(model: PreTrainedModel, num_experts: int, num_frozen: int) -> Variant:
    """LLaVA-CMoE on the FFNs while it learns its newest experts, whose routers know the whole pool."""
    method = _empty(model, top_k=TOP_K)
    generator = torch.Generator().manual_seed(0)
    for site, bank in method.host.banks.items():
        for num in (num_frozen, num_experts - num_frozen):
            bank.freeze()
            bank.grow(num, generator=generator)
            method.routers[site].add_task(bank.ids, bank.anchor.device, generator)
    return Variant(method.model, method.training_context, partial(_answering, method, (1,)))


def cmoe_tasks(model: PreTrainedModel, num_tasks: int, batch_size: int) -> Variant:
    """LLaVA-CMoE after so many tasks, each of which grew everywhere; a batch asks for as many of them as it can.

    A task's routers know its own experts and some older ones.
    """
    method = _empty(model, top_k=TOP_K)
    generator = torch.Generator().manual_seed(0)
    for site, bank in method.host.banks.items():
        bank.grow(TOP_K * num_tasks, generator=generator)
        for task in range(num_tasks):
            ids = bank.ids[max(0, TOP_K * task - OLD_EXPERTS) : TOP_K * (task + 1)]
            method.routers[site].add_task(ids, bank.anchor.device, generator)
        bank.freeze()
    tasks = tuple(task * (num_tasks - 1) // max(1, batch_size - 1) for task in range(batch_size))
    return Variant(method.model, plain, partial(_answering, method, tasks))


def moelora(model: PreTrainedModel, rank: int, num_experts: int) -> Variant:
    """CoIN's MoELoRA on all linears."""
    settings = MoeLoraSettings(rank=rank, num_experts=num_experts)
    method = MoeLora(settings, sharing(model), None, seed=0)  # type: ignore[arg-type]  # no text is read
    return Variant(method.model, method.training_context, method.answering)


class LoopMoe(nn.Module):
    """A frozen linear, a dense gate, and experts one after another: y = W0 x + sum_e softmax(G x)_e B_e A_e x."""

    def __init__(self, frozen: nn.Linear, rank: int, num_experts: int) -> None:
        """Experts of `rank` each, scaled by 2."""
        super().__init__()
        linear = partial(nn.Linear, bias=False, device=frozen.weight.device, dtype=torch.float32)
        self.frozen = frozen
        self.gate = linear(frozen.in_features, num_experts)
        self.down = nn.ModuleList(linear(frozen.in_features, rank) for _ in range(num_experts))
        self.up = nn.ModuleList(linear(rank, frozen.out_features) for _ in range(num_experts))

    def forward(self, x_BTI: Tensor) -> Tensor:
        """The frozen output and the gated sum."""
        y_BTO: Tensor = self.frozen(x_BTI)
        x_BTI = x_BTI.to(self.gate.weight.dtype)
        gate_BTE = self.gate(x_BTI).softmax(dim=-1)
        for expert, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y_BTO = y_BTO + (2 * gate_BTE[..., expert, None] * up(down(x_BTI))).to(y_BTO.dtype)
        return y_BTO


def loop(model: PreTrainedModel, rank: int, num_experts: int) -> Variant:
    """The usual form, at MoELoRA's sizes."""
    shared = sharing(model)
    for site in linear_sites(shared):
        for path in _paths(site):
            linear = shared.get_submodule(path)
            assert isinstance(linear, nn.Linear), "not quantized"
            shared.set_submodule(path, LoopMoe(linear, rank // num_experts, num_experts))
    return Variant(shared, plain, plain)


STEPS: dict[str, Build] = {
    "lora_16": partial(lora, rank=TOP_K * RANK),
    "lora_64": partial(lora, rank=8 * RANK),
    "cmoe_8_all_learn": partial(cmoe, num_experts=8, num_frozen=0),
    "cmoe_8": partial(cmoe, num_experts=8, num_frozen=6),
    "cmoe_64": partial(cmoe, num_experts=64, num_frozen=62),
    "cmoe_256": partial(cmoe, num_experts=256, num_frozen=254),
    "lora_128_everywhere": partial(lora, rank=128, everywhere=True),
    "moelora_128": partial(moelora, rank=128, num_experts=8),
    "loop_128": partial(loop, rank=128, num_experts=8),
}
"""What is measured while it learns: experts of rank 8 on the FFNs beside LoRA of their total and of their active rank;
MoELoRA on all linears beside LoRA of its rank and the usual form."""

BARS: dict[str, tuple[str, str, str, float]] = {
    "8 experts / LoRA of their total rank": ("cmoe_8_all_learn", "lora_64", "step", 1.0),
    "8 experts, 6 frozen / LoRA of their total rank": ("cmoe_8", "lora_64", "step", 1.0),
    "64 experts / LoRA of the active rank": ("cmoe_64", "lora_16", "step", 1.25),
    "64 experts / LoRA of the active rank, prefill": ("cmoe_64", "lora_16", "prefill", 1.2),
    "256 experts / 64 experts": ("cmoe_256", "cmoe_64", "step", 1.15),
    "MoELoRA / LoRA of its rank": ("moelora_128", "lora_128_everywhere", "step", 1.1),
    "MoELoRA / the usual form": ("moelora_128", "loop_128", "step", 1 / 3),
}
"""Ratio, by name: which variant by which other, of what, and the most that it should be."""


def _empty(model: PreTrainedModel, top_k: int) -> Cmoe:
    settings = CmoeSettings.model_validate({"experts": {"rank": RANK, "alpha": 2.0 * RANK, "top_k": top_k}})
    return Cmoe(settings, sharing(model), None, seed=0)  # type: ignore[arg-type]  # no text is read


def _answering(method: Cmoe, tasks: Sequence[int], batch: Batch) -> AbstractContextManager[object]:
    """Samples go by these tasks in turn."""
    num, device = len(batch["input_ids"]), batch["input_ids"].device
    return method.answering(batch, torch.tensor([tasks[row % len(tasks)] for row in range(num)], device=device))


def _paths(site: Site) -> list[str]:
    return [f"{site.name}.{path}" if path else site.name for path in site.linears]
