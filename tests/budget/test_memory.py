"""Bytes by part: what a real step holds, what DeepSpeed estimates, what bitsandbytes packs."""

import bitsandbytes
import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch import nn

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.backbones.outlines import outline
from llava_cmoe.budget.activations import activations
from llava_cmoe.budget.course import grow, on_paper
from llava_cmoe.budget.memory import MAX_LIVE, STRATEGIES, Load, Memory, backbone_bytes, memory_of, nf4_bytes
from llava_cmoe.data.collator import Collator
from llava_cmoe.experts import ledger
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.registry.restore import build_method
from llava_cmoe.settings import BackboneSettings, Recipe

STRATEGY = {strategy.name: strategy for strategy in STRATEGIES}
LOAD = Load({"none": 2 * 7_000, "8bit": 7_000, "nf4": 4_000}, frozen=7_000, pool=800, trained=160, compute_bytes=2)


def pocket(attention: str, precision: str, also_in: tuple[str, ...] = ()) -> Recipe:
    return Recipe.model_validate(
        {
            "run": "runs/x",
            "backbone": {"path": "pocket", "attention": attention},
            "method": {"name": "cmoe", "experts": {"rank": 64, "also_in": also_in}},
            "training": {"batch_size": 3, "precision": precision},
        }
    )


def batch_of(method: Cmoe, text_tokens: int) -> dict[str, torch.Tensor]:
    """Three samples with a picture each."""
    tokenizer = method.processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids_T = torch.tensor([tokenizer.bos_token_id, *[image] * 49, *[7] * (text_tokens - 1)])
    row = {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T), "labels": ids_T}
    pixels = torch.zeros(1, 3, 84, 84)
    return Collator(tokenizer.pad_token_id)([row | {"pixel_values": pixels} for _ in range(3)])


def kept_by(method: Cmoe, batch: dict[str, torch.Tensor], bf16: bool) -> tuple[int, torch.Tensor]:
    """Bytes that a real forward pass keeps for backward, without weights; and its loss."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in method.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saving, torch.autocast("cpu", torch.bfloat16, enabled=bf16), method.learning(batch) as extra_loss:
        loss = method.model(**batch, use_cache=False).loss + extra_loss()
    return sum(storage.nbytes() for storage in kept.values()), loss


@pytest.mark.parametrize(
    ("attention", "precision", "also_in"),
    [("eager", "bf16", ()), ("sdpa", "float32", ()), ("eager", "float32", ("vision", "projector"))],
)
def test_a_real_step_of_the_pocket_backbone_holds_what_is_computed(
    attention: str, precision: str, also_in: tuple[str, ...]
):
    recipe = pocket(attention, precision, also_in)
    method = build_method(recipe, load_backbone(recipe.backbone))
    assert isinstance(method, Cmoe)
    for bank in method.host.banks.values():
        bank.grow(2, generator=torch.Generator())
        bank.add_router(generator=torch.Generator())
    method.model.train()
    batch, bf16 = batch_of(method, text_tokens=51), precision == "bf16"
    kept, loss = kept_by(method, batch, bf16)
    trained = [parameter for parameter in method.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    loss.backward()
    optimizer.step()

    learner = on_paper(recipe)
    assert isinstance(learner, Cmoe)
    grow(learner, [dict.fromkeys(learner.host.banks, 2)])
    frame = outline(recipe.backbone)
    load = Load(backbone_bytes(frame), frame.num_parameters(), 0, ledger.trainable(learner.model).parameters, 4)
    memory = memory_of(load, STRATEGY["none or DDP"], num_gpus=1)
    weights = ledger.size_of(method.model.parameters())
    assert (memory.backbone["none"], memory.pool) == (weights.bytes - ledger.size_of(trained).bytes, 0)
    assert memory.trained == ledger.size_of(trained).bytes
    assert memory.gradients == ledger.size_of(parameter.grad for parameter in trained).bytes
    moments = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    assert memory.optimizer == ledger.size_of(moments).bytes  # and a step counter per tensor
    # Not exact: the order of image and text tokens, and where pictures learn, how their features are put in place.
    assert activations(learner, recipe.training, length=100).kept == pytest.approx(kept, rel=0.02)


def test_checkpointing_keeps_what_enters_the_layers_and_one_layers_own():
    recipe = pocket("eager", "float32")
    method = build_method(recipe, load_backbone(recipe.backbone))
    assert isinstance(method, Cmoe)
    for bank in method.host.banks.values():
        bank.grow(2, generator=torch.Generator())
        bank.add_router(generator=torch.Generator())
    batch = batch_of(method, text_tokens=51)
    method.model.train()
    everything, _ = kept_by(method, batch, bf16=False)
    # The reentrant kind, as it saves what enters where a hook sees it; a layer's own is then computed in backward.
    method.model.gradient_checkpointing_enable({"use_reentrant": True})
    method.model.enable_input_require_grads()
    entering, _ = kept_by(method, batch, bf16=False)
    learner = on_paper(recipe)
    assert isinstance(learner, Cmoe)
    grow(learner, [dict.fromkeys(learner.host.banks, 2)])
    found = activations(learner, recipe.training, length=100)
    layers = len(method.host.banks)
    assert found.checkpointed == pytest.approx(entering + (everything - entering) / layers, rel=0.05)
    assert entering < found.checkpointed < found.kept / 2


@pytest.mark.parametrize("num_gpus", [1, 2, 8])
def test_what_is_trained_takes_what_deepspeed_estimates(num_gpus: int):
    load = Load({"none": 0, "8bit": 0, "nf4": 0}, frozen=0, pool=0, trained=1_600, compute_bytes=2)
    memory = memory_of(load, STRATEGY["ZeRO-2"], num_gpus)
    _, estimated = estimate_zero2_model_states_mem_needs(1_600, num_gpus, cpu_offload=False)
    assert memory.states("none") == estimated
    memory = memory_of(load, STRATEGY["ZeRO-2, offload"], num_gpus)
    _, estimated = estimate_zero2_model_states_mem_needs(1_600, num_gpus, cpu_offload=True)
    assert memory.states("none") == estimated
    memory = memory_of(load, STRATEGY["ZeRO-3"], num_gpus)
    _, estimated, _ = estimate_zero3_model_states_mem_needs(1_600, 0, num_gpus, cpu_offload=False)
    # Of ZeRO-3 DeepSpeed counts one kind of gradient only; both exist while the optimizer steps.
    assert memory.states("none") == estimated + memory.gradients + memory.gathered
    assert memory.gathered == 2 * 1_600


def test_nothing_vanishes_when_it_is_offloaded():
    for name in ("ZeRO-2", "ZeRO-3"):
        on_gpu = memory_of(LOAD, STRATEGY[name], 4)
        offloaded = memory_of(LOAD, STRATEGY[f"{name}, offload"], 4)
        assert total(on_gpu) == total(offloaded) and (on_gpu.host, on_gpu.gathered) == (0, offloaded.gathered)


def total(memory: Memory) -> int:
    states = memory.states("none")
    assert states is not None
    return states + memory.host


def test_spreading_further_never_takes_more_and_zero_3_refuses_quantized_weights():
    for strategy in STRATEGIES[1:]:
        sizes = [memory_of(LOAD, strategy, num_gpus).states("none") for num_gpus in (1, 2, 4, 8)]
        assert sizes == sorted(sizes, reverse=True)
        quantized = memory_of(LOAD, strategy, 8).states("nf4")
        assert (quantized is None) == (strategy.stage == 3)


def test_ddp_keeps_copies_of_the_gradients_and_zero_3_gathers_no_more_than_its_limit():
    alone, ddp = (memory_of(LOAD, STRATEGY["none or DDP"], num_gpus) for num_gpus in (1, 2))
    assert (ddp.gradients, ddp.optimizer) == (2 * alone.gradients, alone.optimizer)
    large = Load({"none": 2 * 7 * MAX_LIVE}, 7 * MAX_LIVE, 0, 0, 2)
    assert memory_of(large, STRATEGY["ZeRO-3"], 8).gathered == 2 * MAX_LIVE


@pytest.mark.parametrize("shape", [(64, 64), (96, 640), (7, 130)])
def test_quantized_linears_take_what_bitsandbytes_makes_of_them(shape: tuple[int, int]):
    linear = nn.Linear(shape[1], shape[0], bias=False)
    packed = bitsandbytes.nn.Linear4bit(
        shape[1], shape[0], bias=False, compress_statistics=True, quant_type="nf4", compute_dtype=torch.float32
    )
    packed.load_state_dict(linear.state_dict())
    packed.to("cpu")
    state = packed.weight.quant_state
    held = [packed.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(linear.weight.numel()) == ledger.size_of(held).bytes


def test_the_llms_linears_alone_are_quantized():
    frame = outline(BackboneSettings(path="llava-hf/llava-1.5-7b-hf", dtype="bfloat16"))
    sizes = backbone_bytes(frame)
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    rows = 4 * 4096 + 2 * 11008 + 4096
    assert frame.num_parameters() == 7_063_427_072 and sizes["none"] == 2 * frame.num_parameters()
    assert sizes["8bit"] == sizes["none"] - 32 * layer + 32 * 4 * rows
    assert sizes["nf4"] == pytest.approx(sizes["none"] - 2 * 32 * layer + 32 * layer * (0.5 + 1 / 64), rel=1e-3)
