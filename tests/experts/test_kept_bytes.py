"""What a step keeps for backward, counted: experts keep about what one LoRA of their total rank keeps."""

import pytest
import torch
from banks import train_task
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llava_cmoe.backbones.sites import attention_sites, ffn_sites
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.surgery import install
from llava_cmoe.planning.activations import Saved

TOKENS = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS, "attention_mask": torch.ones_like(TOKENS)}


def made() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    return LlamaForCausalLM(config).requires_grad_(False)


@pytest.mark.parametrize(("num_tasks", "num_new", "rank"), [(1, 8, 8), (4, 2, 8), (8, 1, 4), (2, 1, 16)])
def test_experts_keep_for_backward_what_one_adapter_of_their_total_rank_keeps(
    num_tasks: int, num_new: int, rank: int
) -> None:
    total = num_tasks * num_new * rank
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    adapter = get_peft_model(made(), LoraConfig(r=total, lora_alpha=total, target_modules=targets))
    with Saved(adapter) as by_adapter:
        adapter(**BATCH)
    model, generator = made(), torch.Generator().manual_seed(0)
    sites = [site for layer in zip(attention_sites(model), ffn_sites(model), strict=True) for site in layer]
    host = install(model, sites, lambda width: TaskRouters(width, 2), rank=rank, alpha=2.0 * rank)
    for _ in range(num_tasks):
        for bank in host.banks.values():
            bank.freeze()
            train_task(bank, num_new, generator)
    with Saved(model) as by_experts, host.context.use(RoutePlan.single(num_tasks - 1), BATCH):
        model(**BATCH)
    assert by_experts.read().kept <= 1.1 * by_adapter.read().kept
