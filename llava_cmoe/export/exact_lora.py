"""Experts as LoRA adapters, exactly: where the plan alone decides every gate, whatever the token and the prompt.

    sum_e g_e s B_e A_e x   =   [g_1 s B_1 .. g_E s B_E] [A_1; ..; A_E] x        s = alpha / rank

A sum over experts is the inner sum of a matrix product, so concatenated along their ranks they are one adapter of the
sum of these ranks. Whether a gate is fixed its router says (`Gate.fixed`), in a forward pass over one short prompt.
Shape letters: B batch, T tokens, D hidden, E experts, R rank, F the ranks of all experts, O output width of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from llava_cmoe.backbones.sites import image_token_of
from llava_cmoe.data.batches import on_device
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import Processor, encode_prompt, tokenizer_of
from llava_cmoe.data.encoding import SMALL
from llava_cmoe.data.rows import question
from llava_cmoe.experts.routers.base import Gate
from llava_cmoe.experts.stack import stack_name
from llava_cmoe.experts.surgery import ExpertHost
from llava_cmoe.export.lora import Adapter
from llava_cmoe.methods.base import Method

FixedGates = Mapping[str, Mapping[int, float] | None]
"""Site to the weight of each expert in its gate; None where tokens or prompts decide them."""


@torch.no_grad()
def fixed_gates(method: Method, processor: Processor, task: int) -> FixedGates:
    """The gates of a task at all sites that have experts; needs no data, and a grey picture where the model reads any.

    Costs one forward pass.
    """
    assert method.host is not None, "a method with banks"
    found: dict[str, Mapping[int, float] | None] = {}

    def note(site: str, router: nn.Module, args: tuple[Any, ...], gate: Gate | None) -> None:
        if gate is None:
            found[site] = {}
        elif gate.fixed:
            gate_E = gate.gate_BTE[0, 0].tolist()
            found[site] = dict(zip(range(len(gate_E)) if gate.ids is None else gate.ids, gate_E, strict=True))
        else:
            found[site] = None

    hooks = [bank.router.register_forward_hook(partial(note, site)) for site, bank in method.host.banks.items()]
    reads_images = image_token_of(method.model) is not None
    grey = Image.new("RGB", (SMALL, SMALL), "grey") if reads_images else None
    row = encode_prompt(processor, [{"role": "user", "text": question("What is it?", reads_images)}], grey)
    batch = on_device(Collator(tokenizer_of(processor).pad_token_id, "left")([row]), method.model.device)
    try:
        with method.answering(batch, torch.tensor([task])):
            method.model.base_model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def exact_adapters(host: ExpertHost, gates: FixedGates) -> dict[str, Adapter]:
    """Module path in the bare backbone to the adapter there; linears whose gate weighs no expert are absent."""
    found: dict[str, Adapter] = {}
    for site, gate in gates.items():
        bank = host.banks[site]
        assert gate is not None, "a gate that is fixed"
        weights = {expert: weight for expert, weight in gate.items() if weight and expert in bank.ids}
        for path in bank.site.linears if weights else ():
            pair = bank.stacks[stack_name(path)].read(weights)
            weight_E11 = torch.tensor(list(weights.values()), device=pair.b_EOR.device).view(-1, 1, 1)
            b_EOR = pair.b_EOR.float() * weight_E11 * (bank.alpha / bank.rank)
            name = f"{site}.{path}".removesuffix(".")
            found[name] = Adapter(pair.a_ERI.float().flatten(0, 1), b_EOR.movedim(0, 1).flatten(1))
    return found
