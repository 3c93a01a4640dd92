import torch
from banks import Parts, add_task, train_task
from transformers import LlamaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaMLP

from llava_cmoe.backbones.sites import Site, ffn_sites
from llava_cmoe.experts.ledger import (
    Size,
    Trained,
    expert_parameters,
    size_of,
    stored,
    trainable,
    trained,
    trained_per_site,
)
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.state import state_of
from llava_cmoe.experts.surgery import ExpertHost, install


def test_an_expert_on_the_ffn_of_llama_7b_has_45312_parameters_per_rank() -> None:
    with torch.device("meta"):
        model = Parts(mlp=LlamaMLP(LlamaConfig(hidden_size=4096, intermediate_size=11008)))
    site = Site("mlp", 0, ("gate_proj", "up_proj", "down_proj"))
    bank = install(model, [site], lambda width: TaskRouters(width, top_k=2), rank=64, alpha=128).banks["mlp"]
    assert expert_parameters(bank) == 45_312 * 64 == 64 * 3 * (4096 + 11008)


def test_counts_equal_the_tensors_that_exist_and_the_closed_formula(
    host: ExpertHost, generator: torch.Generator
) -> None:
    shallow, deep = host.banks.values()
    of_tasks = []
    for task, (in_shallow, in_deep) in enumerate(((2, 1), (0, 3))):
        train_task(shallow, in_shallow, generator), train_task(deep, in_deep, generator)
        of_tasks.append(trained(host.banks))
        state = state_of(host.banks, task)
        experts, router = size_of(state.experts.values()), size_of(state.routers.values())
        assert of_tasks[-1] == Trained(experts, router)
        if task == 1:
            expert = 3 * 3 * (32 + 64)
            assert trained_per_site(host.banks) == {
                shallow.site.name: Trained(Size(), Size(2 * 32, 2 * 32 * 4)),
                deep.site.name: Trained(Size(3 * expert, 3 * expert * 4), Size(4 * 32, 4 * 32 * 4)),
            }
        host.freeze()
        assert trained(host.banks) == Trained()  # to be read before
    assert stored(host.banks) == of_tasks[0].total + of_tasks[1].total == (of_tasks[0] + of_tasks[1]).total


def test_trainable_is_what_the_newest_task_adds_and_nothing_once_frozen(
    tiny_llava: LlavaForConditionalGeneration, generator: torch.Generator
) -> None:
    host = install(
        tiny_llava,
        ffn_sites(tiny_llava),
        lambda width: TaskRouters(width, top_k=2),
        rank=2,
        alpha=2.0,
        dtype=torch.bfloat16,
    )
    for num_new in (2, 1):
        for bank in host.banks.values():
            add_task(bank, num_new, generator)
        newest = trained(host.banks)
        assert trainable(tiny_llava) == newest.total
        host.freeze()
        assert trainable(tiny_llava) == Size(0, 0)
    expert = 2 * 3 * (32 + 64)
    assert newest == Trained(Size(2 * expert, 2 * expert * 2), Size(2 * 3 * 32, 2 * 3 * 32 * 4))
