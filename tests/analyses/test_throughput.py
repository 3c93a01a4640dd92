"""The paces of experts and of plain LoRA are those of the same model, rows and settings; any size can be built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from banks import add_task
from transformers import LlavaForConditionalGeneration

from llava_cmoe.analyses import throughput
from llava_cmoe.analyses.throughput import SyntheticRows, Workload, config_of, measure_training, random_model
from llava_cmoe.experts import ledger
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.cmoe import CmoeSettings
from llava_cmoe.settings.training import TrainingSettings

LOAD = Workload(batch_size=2, tokens=5, experts=3, repetitions=2)


def measure(model: str, random_weights: bool, **backbone: Any) -> dict[str, Any]:
    settings = TrainingSettings(gradient_checkpointing=True, optimizer="adamw_bnb_8bit")
    return measure_training(model, random_weights, "cpu", LOAD, BackboneSettings(**backbone), settings)


@pytest.mark.parametrize(("random_weights", "quantization"), [(True, "none"), (False, "nf4")])
def test_both_methods_are_measured_on_one_model_that_is_left_as_it_was(
    tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch, random_weights: bool, quantization: str
):
    stock, logits = [], []

    def watched(name: str, part: int) -> Any:
        change = throughput.MEASURED[name][part]

        def changed(first: Any, *rest: Any) -> Any:
            result = change(first, *rest)
            model = first if part == 0 else result
            stock.append(model)
            if part == 1:
                with torch.no_grad():
                    logits.append(model.eval()(input_ids=torch.arange(9)[None]).logits)
            return result

        return changed

    pairs = {name: (watched(name, 0), watched(name, 1)) for name in throughput.MEASURED}
    monkeypatch.setattr(throughput, "MEASURED", pairs)
    found = measure(str(tiny_backbone), random_weights, quantization=quantization)
    assert len({id(model) for model in stock}) == 1 and torch.equal(*logits)
    paces = found["paces"]
    assert paces.keys() == {"lora", "cmoe"}
    assert all(
        pace["learning"] > 0 and pace["reading"] > 0 and pace["trained_parameters"] > 0 for pace in paces.values()
    )
    ratio = paces["lora"]["learning"] / paces["cmoe"]["learning"]
    assert found["cmoe_to_lora"]["learning_time"] == pytest.approx(ratio)
    assert found["load"]["row_tokens"] == 4 + LOAD.tokens
    assert (found["weights"] == "random") == random_weights


def test_a_row_has_its_picture_and_no_stray_one():
    config = config_of("pocket")
    rows = SyntheticRows(config, Workload(tokens=500, repetitions=1))
    row = rows[3]
    assert int((row["input_ids"] == config.image_token_id).sum()) == config.image_seq_length
    assert torch.equal(row["input_ids"], rows[3]["input_ids"]) and not torch.equal(
        row["input_ids"], rows[4]["input_ids"]
    )
    assert row["input_ids"].max() < config.text_config.vocab_size


def test_random_weights_are_the_same_each_time_and_in_the_dtype_asked_for():
    first, second = (random_model(config_of("pocket"), BackboneSettings(dtype="bfloat16"), "cpu") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))
    assert {value.dtype for value in first.parameters()} == {torch.bfloat16}
    assert not any(value.requires_grad for value in first.parameters())


def test_seven_billion_weights_can_be_built_and_grown_where_there_is_no_memory_for_them():
    model = random_model(config_of("llava-1.5-7b"), BackboneSettings(dtype="bfloat16"), "meta")
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.num_parameters() == 7_063_427_072  # as the checkpoint has
    settings = CmoeSettings(experts={"rank": 2})
    method = Cmoe(settings, model, None, seed=0)
    generator = torch.Generator().manual_seed(0)
    for bank in method.host.banks.values():
        add_task(bank, 1, generator)
        assert bank.anchor.device.type == "meta"
    assert ledger.trainable(model).parameters == 32 * (2 * 45_312 + 4096)


def test_what_cannot_be_measured_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="no size that is known"):
        measure("llava-9b", random_weights=True)
    with pytest.raises(RecipeError, match="random weights are not quantized"):
        measure("pocket", random_weights=True, quantization="nf4")
