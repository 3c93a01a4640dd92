"""Bytes by part: what real steps hold, alone and under DeepSpeed, what bitsandbytes packs, and the formulas."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from test_engines import started
from torch import nn

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.backbones.meta_model import meta_model
from llava_cmoe.data.collator import Collator
from llava_cmoe.experts import ledger
from llava_cmoe.experts.ledger import Size
from llava_cmoe.methods.base import Method
from llava_cmoe.planning.activations import activations
from llava_cmoe.planning.estimate import model_states
from llava_cmoe.planning.growth_schedule import fits_on_paper, on_paper
from llava_cmoe.planning.memory import (
    MAX_LIVE,
    STRATEGIES,
    Memory,
    ModelStates,
    backbone_bytes,
    memory_of,
    moments,
    nf4_bytes,
)
from llava_cmoe.registry.restore import build_method
from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.run import Recipe

STRATEGY = {strategy.name: strategy for strategy in STRATEGIES}
STATES = ModelStates(
    {"none": 2 * 7_000, "8bit": 7_000, "nf4": 4_000},
    frozen=7_000,
    pool=Size(800, 4 * 800),
    trained=Size(160, 4 * 160),
    optimizer="adamw",
)
NARROW = replace(STATES, pool=Size(800, 2 * 700 + 4 * 100), trained=Size(160, 2 * 120 + 4 * 40))
"""The same with experts in bfloat16, beside routers."""


def pocket(attention: str, precision: str, also_in: tuple[str, ...] = ()) -> Recipe:
    return Recipe.model_validate(
        {
            "run": "runs/x",
            "backbone": {"path": "pocket", "attention": attention},
            "method": {"name": "cmoe", "experts": {"rank": 64, "also_in": also_in}},
            "training": {"batch_size": 3, "precision": precision},
        }
    )


def batch_of(method: Method, text_tokens: int) -> dict[str, torch.Tensor]:
    """Three samples with a picture each."""
    tokenizer = method.processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids_T = torch.tensor([tokenizer.bos_token_id, *[image] * 49, *[7] * (text_tokens - 1)])
    row = {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T), "labels": ids_T}
    pixels = torch.zeros(1, 3, 84, 84)
    return Collator(tokenizer.pad_token_id)([row | {"pixel_values": pixels} for _ in range(3)])


def kept_by(method: Method, batch: dict[str, torch.Tensor], bf16: bool) -> tuple[int, torch.Tensor]:
    """Bytes that a real forward pass keeps for backward, without weights; and its loss."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in method.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saving, torch.autocast("cpu", torch.bfloat16, enabled=bf16), method.training_context(batch) as extra_loss:
        output = method.model(**batch, use_cache=False)
        loss = output.loss + extra_loss(output)
    return sum(storage.nbytes() for storage in kept.values()), loss


def states_of(recipe: Recipe, planned: Method) -> ModelStates:
    return model_states(meta_model(recipe.backbone), planned, recipe.training.optimizer)


@pytest.mark.parametrize(
    ("attention", "precision", "also_in"),
    [("eager", "bf16", ()), ("sdpa", "float32", ()), ("eager", "float32", ("vision", "projector"))],
)
def test_a_real_step_of_the_pocket_backbone_holds_what_is_computed(
    attention: str, precision: str, also_in: tuple[str, ...]
):
    recipe = pocket(attention, precision, also_in)
    method = build_method(recipe, load_backbone(recipe.backbone))
    next(method.planned_fits(1))
    method.model.train()
    batch, bf16 = batch_of(method, text_tokens=51), precision == "bf16"
    kept, loss = kept_by(method, batch, bf16)
    trained = [parameter for parameter in method.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    loss.backward()
    optimizer.step()

    planned = on_paper(recipe)
    next(fits_on_paper(planned, 1))
    memory = memory_of(states_of(recipe, planned), STRATEGY["none or DDP"], num_gpus=1)
    weights = ledger.size_of(method.model.parameters())
    assert (memory.backbone["none"], memory.pool) == (weights.bytes - ledger.size_of(trained).bytes, 0)
    assert memory.trained == ledger.size_of(trained).bytes
    assert memory.gradients == ledger.size_of(parameter.grad for parameter in trained).bytes
    moments = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    assert memory.optimizer == ledger.size_of(moments).bytes  # and a step counter per tensor
    # Not exact: the order of image and text tokens, and where pictures learn, how their features are put in place.
    assert activations(planned, recipe.training, length=100).kept == pytest.approx(kept, rel=0.02)


def test_checkpointing_keeps_what_enters_the_layers_and_one_layers_own():
    recipe = pocket("eager", "float32")
    method = build_method(recipe, load_backbone(recipe.backbone))
    next(method.planned_fits(1))
    batch = batch_of(method, text_tokens=51)
    method.model.train()
    everything, _ = kept_by(method, batch, bf16=False)
    # The reentrant kind, as it saves what enters where a hook sees it; a layer's own is then computed in backward.
    method.model.gradient_checkpointing_enable({"use_reentrant": True})
    method.model.enable_input_require_grads()
    entering, _ = kept_by(method, batch, bf16=False)
    planned = on_paper(recipe)
    next(fits_on_paper(planned, 1))
    found = activations(planned, recipe.training, length=100)
    layers = len(method.host.banks)
    assert found.checkpointed == pytest.approx(entering + (everything - entering) / layers, rel=0.05)
    assert entering < found.checkpointed < found.kept / 2


CMOE = {"name": "cmoe", "experts": {"rank": 8}, "probe": {"scope": "all", "max_new_experts": 2}}
SEVERAL: dict[str, tuple[tuple[dict[str, Any], str, str, str], ...]] = {
    "zero2": (
        (CMOE, "bfloat16", "bf16", "adamw"),
        (CMOE, "float32", "bf16", "paged_adamw_32bit"),
        ({"name": "sequential_lora", "rank": 8}, "bfloat16", "float32", "adamw_bnb_8bit"),
    ),
    "zero3": (
        (CMOE, "bfloat16", "bf16", "paged_adamw_8bit"),
        ({"name": "moelora", "rank": 16, "num_experts": 4}, "float32", "bf16", "adamw"),
    ),
}
"""Method, precision of the frozen weights, of arithmetic, and optimizer, by engine."""


def recipes_under(engine: str, backbone: Path) -> list[Recipe]:
    return [
        Recipe.model_validate(
            {
                "run": "runs/x",
                "backbone": {"path": str(backbone), "dtype": dtype},
                "method": method,
                "training": {"batch_size": 2, "precision": precision, "optimizer": optimizer},
            }
        )
        for method, dtype, precision, optimizer in SEVERAL[engine]
    ]


@pytest.fixture(scope="module")
def seen_under(tiny_backbone: Path) -> Callable[[str], dict[str, Any]]:
    """What a process trained under an engine sees, each engine once."""

    @cache
    def seen(engine: str) -> dict[str, Any]:
        script = str(Path(__file__).with_name("engine_bytes.py"))
        recipes = [recipe.model_dump_json() for recipe in recipes_under(engine, tiny_backbone)]
        finished = started(engine, [script, *recipes], num_processes=1)
        assert finished.returncode == 0, finished.stderr[-4000:]
        found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        return found

    return seen


@pytest.mark.parametrize(("engine", "strategy"), [("zero2", "ZeRO-2"), ("zero3", "ZeRO-3")])
def test_a_real_engine_holds_what_is_computed(
    engine: str, strategy: str, tiny_backbone: Path, seen_under: Callable[[str], dict[str, Any]]
):
    for recipe, held in zip(recipes_under(engine, tiny_backbone), seen_under(engine)["held"], strict=True):
        planned = on_paper(recipe)
        next(fit for fit in fits_on_paper(planned, 2) if (fit.stage, fit.label) == (1, "training"))
        memory = memory_of(states_of(recipe, planned), STRATEGY[strategy], num_gpus=1)
        assert held["frozen"] == (memory.backbone["none"] or 0) + memory.pool
        assert (held["trained"], held["gradients"], held["widths"]) == (memory.trained, memory.gradients, [4])
        assert held["optimizer"] == memory.optimizer


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_eight_stages_leave_no_engine_and_no_memory_behind(engine: str, seen_under: Callable[[str], dict[str, Any]]):
    left = seen_under(engine)["left"]
    assert [stage["engines"] for stage in left] == [0] * 8
    assert len({stage["bytes"] for stage in left}) == 1


@pytest.mark.parametrize("num_gpus", [1, 2, 8])
def test_zero_learns_in_float32_and_keeps_the_frozen_as_it_is(num_gpus: int):
    states = STATES
    one, two, three = (memory_of(states, STRATEGY[f"ZeRO-{stage}"], num_gpus) for stage in (1, 2, 3))
    share = 160 // num_gpus
    for spread in (one, two):
        assert spread.backbone == states.backbone
        assert (spread.pool, spread.trained, spread.optimizer) == (states.pool.bytes, 4 * 160, 16 * share)
    assert (one.gradients, two.gradients, three.gradients) == (4 * 160, 4 * share, 4 * share)
    assert (three.trained, three.optimizer) == (4 * share, 16 * share)
    assert three.pool == states.pool.bytes // num_gpus
    assert three.backbone["none"] == 2 * 7_000 // num_gpus
    assert three.gathered == 2 * 7_000 + states.pool.bytes + 4 * 160


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGY.items() if strategy.stage])
def test_deepspeed_holds_no_experts_that_are_narrower_than_their_routers(name: str):
    memory = memory_of(NARROW, STRATEGY[name], num_gpus=2)
    assert {memory.states(quantization) for quantization in memory.backbone} == {None}


def test_without_zero_all_is_as_wide_as_it_is_learned():
    for states in (STATES, NARROW):
        alone = memory_of(states, STRATEGY["none or DDP"], num_gpus=1)
        size = states.trained.bytes
        assert (alone.trained, alone.gradients, alone.optimizer) == (size, size, 2 * size)
        assert (alone.backbone, alone.pool) == (states.backbone, states.pool.bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", torch.optim.AdamW),
        ("adamw_bnb_8bit", bitsandbytes.optim.AdamW8bit),
        ("paged_adamw_32bit", bitsandbytes.optim.AdamW32bit),
    ],
)
def test_moments_take_what_the_optimizers_keep(name: str, make: type[torch.optim.Optimizer], dtype: torch.dtype):
    weight = nn.Parameter(torch.ones(5, 1001, dtype=dtype))  # bitsandbytes keeps up to 4,096 values in 32 bits
    weight.grad = torch.ones_like(weight)
    optimizer = make([weight])
    optimizer.step()
    [state] = optimizer.state.values()
    kept = [value for key, value in state.items() if torch.is_tensor(value) and key not in ("step", "qmap1", "qmap2")]
    assert ledger.size_of(kept).bytes == moments(ledger.size_of([weight]), name)


def test_nothing_vanishes_when_it_is_offloaded():
    for name in ("ZeRO-2", "ZeRO-3"):
        on_gpu = memory_of(STATES, STRATEGY[name], 4)
        offloaded = memory_of(STATES, STRATEGY[f"{name}, offload"], 4)
        assert total(on_gpu) == total(offloaded) and (on_gpu.host, on_gpu.gathered) == (0, offloaded.gathered)


def total(memory: Memory) -> int:
    states = memory.states("none")
    assert states is not None
    return states + memory.host


def test_spreading_further_never_takes_more_and_zero_3_refuses_quantized_weights():
    for strategy in STRATEGIES[1:]:
        sizes = [memory_of(STATES, strategy, num_gpus).states("none") for num_gpus in (1, 2, 4, 8)]
        assert sizes == sorted(sizes, reverse=True)
        quantized = memory_of(STATES, strategy, 8).states("nf4")
        assert (quantized is None) == (strategy.stage == 3)


def test_ddp_keeps_copies_of_the_gradients_and_zero_3_gathers_no_more_than_its_limit():
    alone, ddp = (memory_of(STATES, STRATEGY["none or DDP"], num_gpus) for num_gpus in (1, 2))
    assert (ddp.gradients, ddp.optimizer) == (2 * alone.gradients, alone.optimizer)
    large = ModelStates({"none": 2 * 7 * MAX_LIVE}, 7 * MAX_LIVE, Size(), Size(), "adamw")
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
    model = meta_model(BackboneSettings(path="llava-hf/llava-1.5-7b-hf", dtype="bfloat16"))
    sizes = backbone_bytes(model)
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    rows = 4 * 4096 + 2 * 11008 + 4096
    assert model.num_parameters() == 7_063_427_072 and sizes["none"] == 2 * model.num_parameters()
    assert sizes["8bit"] == sizes["none"] - 32 * layer + 32 * 4 * rows
    assert sizes["nf4"] == pytest.approx(sizes["none"] - 2 * 32 * layer + 32 * layer * (0.5 + 1 / 64), rel=1e-3)
