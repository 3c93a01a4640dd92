from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaMLP

from llava_cmoe.backbones.sites import Site, ffn_sites
from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.ledger import Added, Size, added, added_per_site, expert_parameters, size_of, stored, trainable
from llava_cmoe.experts.state import state_of
from llava_cmoe.experts.surgery import ExpertHost, install

Learn = Callable[[ExpertBank, int], None]


def test_an_expert_on_the_ffn_of_llama_7b_has_45312_parameters_per_rank() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"mlp": LlamaMLP(LlamaConfig(hidden_size=4096, intermediate_size=11008))})
    site = Site("mlp", 0, ("gate_proj", "up_proj", "down_proj"))
    bank = install(model, [site], rank=64, alpha=128, top_k=2).banks["mlp"]
    assert expert_parameters(bank) == 45_312 * 64 == 64 * 3 * (4096 + 11008)


def test_counts_equal_the_tensors_that_exist_and_the_closed_formula(host: ExpertHost, learn: Learn) -> None:
    shallow, deep = host.banks.values()
    learn(shallow, 2), learn(deep, 1)
    learn(shallow, 0), learn(deep, 3)
    for task in (0, 1):
        state = state_of(host.banks, task)
        experts, router = size_of(state.experts.values()), size_of(state.routers.values())
        assert added(host.banks, task) == Added(experts, router)
    expert = 3 * 3 * (32 + 64)
    assert added_per_site(host.banks, 1) == {
        shallow.site.name: Added(Size(), Size(2 * 32, 2 * 32 * 4)),
        deep.site.name: Added(Size(3 * expert, 3 * expert * 4), Size(4 * 32, 4 * 32 * 4)),
    }
    assert stored(host.banks) == added(host.banks, 0).total + added(host.banks, 1).total


def test_trainable_is_what_the_newest_task_adds_and_nothing_once_frozen(
    tiny_llava: LlavaForConditionalGeneration, generator: torch.Generator
) -> None:
    host = install(tiny_llava, ffn_sites(tiny_llava), rank=2, alpha=2.0, top_k=2, dtype=torch.bfloat16)
    for num_new in (2, 1):
        for bank in host.banks.values():
            bank.grow(num_new, generator=generator)
            bank.add_router(generator=generator)
        task = 0 if num_new == 2 else 1
        assert trainable(tiny_llava) == added(host.banks, task).total
        host.freeze()
        assert trainable(tiny_llava) == Size(0, 0)
    expert = 2 * 3 * (32 + 64)
    assert added(host.banks, 1) == Added(Size(2 * expert, 2 * expert * 2), Size(2 * 3 * 32, 2 * 3 * 32 * 4))
