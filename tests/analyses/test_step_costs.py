"""Variants take turns on copies that share one model's weights; each computes what it says it does."""

from collections.abc import Callable

import pytest
import torch
from banks import add_task
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llava_cmoe.analyses.speed_variants import BARS, STEPS, LoopMoe, cmoe, cmoe_tasks, loop, lora
from llava_cmoe.analyses.step_costs import (
    Load,
    Variant,
    config_of,
    in_turns,
    made_up_batch,
    measure,
    plain,
    random_model,
    ratio,
    sharing,
)
from llava_cmoe.experts import ledger
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.cmoe import CmoeSettings

LOAD = Load(batch_size=3, tokens=5, turns=2)
CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_llava: LlavaForConditionalGeneration) -> PreTrainedModel:
    return tiny_llava.requires_grad_(False)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(4, 13)[None]).logits
    return found


@pytest.mark.parametrize(
    "build", [lambda model: lora(model, 2), lambda model: cmoe(model, 4, 3), lambda model: loop(model, 4, 2)]
)
def test_a_variant_learns_on_the_models_own_weights_and_leaves_the_model_as_it_was(
    model: PreTrainedModel, build: Callable[[PreTrainedModel], Variant]
):
    before, names = logits(model), list(model.state_dict())
    variant = build(model)
    own = {value.data_ptr() for value in model.parameters()}
    assert own <= {value.data_ptr() for value in variant.model.parameters()}
    batch = made_up_batch(model.config, LOAD, CPU)
    costs, turns = measure({"one": variant, "stock": Variant(sharing(model), plain, plain)}, batch, LOAD, learns=False)
    assert len(turns) == LOAD.turns and costs["one"].operations > costs["stock"].operations
    costs, turns = measure({"one": variant}, batch, Load(3, 5, 2, checkpointing=True))
    assert min(turns[0]["one"].values()) > 0 and turns[0]["one"].keys() == {"step", "prefill", "decoding"}
    assert costs["one"].trained_parameters > 0 and costs["one"].bytes_more is None
    learned = [value for value in variant.model.parameters() if value.requires_grad]
    assert any(value.grad is None for value in learned)  # taken back after the step
    assert torch.equal(logits(model), before) and list(model.state_dict()) == names


def test_every_ratio_that_has_a_bar_is_of_variants_that_are_measured():
    for one, other, part, most in BARS.values():
        assert {one, other} <= STEPS.keys() and part in ("step", "prefill", "decoding") and most > 0


def test_what_is_compared_takes_turns_and_each_begins_as_often_as_the_others():
    said: list[str] = []

    def say(name: str) -> str:
        said.append(name)
        return name

    turns = list(in_turns({name: lambda name=name: say(name) for name in "abc"}, 4))
    assert turns == [{"a": "a", "b": "b", "c": "c"}] * 4
    begun = said[::3]
    assert len(begun) == 6 and {begun.count(name) for name in "abc"} == {2}
    assert all(sorted(said[3 * turn : 3 * turn + 3]) == ["a", "b", "c"] for turn in range(6))


def test_a_ratio_is_the_median_within_turns():
    turns = [{"a": {"step": a}, "b": {"step": b}} for a, b in ((1.0, 1.0), (20.0, 10.0), (300.0, 100.0))]
    assert ratio(turns, "a", "b", "step") == {"median": 2, "lower_quartile": 1.5, "upper_quartile": 2.5}


def test_the_usual_form_is_the_dense_sum_of_its_experts():
    moe = LoopMoe(torch.nn.Linear(6, 4, bias=False), rank=2, num_experts=3)
    x_BTI = torch.randn(2, 5, 6)
    gate_BTE = torch.softmax(x_BTI @ moe.gate.weight.T, dim=-1)
    terms = [2 * gate_BTE[..., e, None] * (x_BTI @ moe.down[e].weight.T @ moe.up[e].weight.T) for e in range(3)]
    torch.testing.assert_close(moe(x_BTI), x_BTI @ moe.frozen.weight.T + sum(terms))


@torch.no_grad()
def test_after_any_number_of_tasks_a_step_of_decoding_gives_the_device_as_many_operations(model: PreTrainedModel):
    load = Load(batch_size=4, tokens=3, turns=2)
    batch = made_up_batch(model.config, load, CPU)
    variants = {num: cmoe_tasks(model, num, 4) for num in (20, 40, 80)}
    costs, _ = measure(variants, batch, load, learns=False)
    assert len({cost.operations for cost in costs.values()}) == 1


def test_a_row_has_its_picture_and_no_stray_one():
    config = config_of("pocket")
    batch = made_up_batch(config, Load(batch_size=4, tokens=500), CPU)
    assert (batch["input_ids"] == config.image_token_id).sum(dim=1).tolist() == [config.image_seq_length] * 4
    assert batch["input_ids"].max() < config.text_config.vocab_size
    again = made_up_batch(config, Load(batch_size=4, tokens=500), CPU)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_random_weights_are_the_same_each_time_and_in_the_dtype_asked_for():
    first, second = (random_model(config_of("pocket"), BackboneSettings(dtype="bfloat16"), "cpu") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))
    assert {value.dtype for value in first.parameters()} == {torch.bfloat16}
    assert not any(value.requires_grad for value in first.parameters())


def test_seven_billion_weights_can_be_built_and_grown_where_there_is_no_memory_for_them():
    model = random_model(config_of("llava-1.5-7b"), BackboneSettings(dtype="bfloat16"), "meta")
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.num_parameters() == 7_063_427_072  # as the checkpoint has
    method = Cmoe(CmoeSettings(experts={"rank": 2}), sharing(model), None, seed=0)
    generator = torch.Generator().manual_seed(0)
    for bank in method.host.banks.values():
        add_task(bank, 1, generator)
        assert bank.anchor.device.type == "meta"
    assert ledger.trainable(method.model).parameters == 32 * (2 * 45_312 + 4096)


def test_a_size_that_is_not_known_is_refused():
    with pytest.raises(RecipeError, match="no size that is known"):
        config_of("llava-9b")
