"""The pocket backbone that ships: stock classes, small, and able to do what it was taught."""

from __future__ import annotations

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.pocket.abilities import examine, iou
from llava_cmoe.pocket.backbone import POCKET_DIR, build_model, build_processor
from llava_cmoe.settings.backbone import BackboneSettings


def test_loads_with_stock_auto_classes_and_stays_small() -> None:
    model = AutoModelForImageTextToText.from_pretrained(POCKET_DIR)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(POCKET_DIR), LlavaProcessor)
    assert 3e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 6e6
    assert sum(file.stat().st_size for file in POCKET_DIR.iterdir()) < 15e6
    assert {file.suffix for file in POCKET_DIR.iterdir()} == {".json", ".jinja", ".safetensors"}


def test_shipped_weights_fit_the_shape_and_the_vocabulary_that_the_code_builds() -> None:
    shipped = load_backbone(BackboneSettings())
    built = build_model(seed=0)
    shapes = {name: tuple(value.shape) for name, value in shipped.model.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in built.state_dict().items()}
    assert shipped.processor.tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()
    assert shipped.processor.chat_template == build_processor().chat_template


def test_a_seed_gives_the_same_initial_weights_and_another_seed_others() -> None:
    one, same, other = (build_model(seed).state_dict() for seed in (0, 0, 1))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert one[name].equal(same[name]) and not one[name].equal(other[name])


@pytest.mark.parametrize("text", ["[0.25, 0.50, 0.10, 1.00]", "Wild Summer", "it says taxi.", "A. Moss"])
def test_tokenizer_gives_answers_back_as_they_were(text: str) -> None:
    tokenizer = build_processor().tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_shipped_backbone_can_do_what_it_was_taught_and_an_untaught_one_cannot() -> None:
    shipped = load_backbone(BackboneSettings(attention="eager"))
    abilities = examine(shipped.model, shipped.processor, num=24)
    untaught = examine(build_model(seed=0).eval(), shipped.processor, num=4)
    assert abilities["object"] >= 75 and abilities["title"] >= 80 and abilities["spoken"] >= 40
    assert set(untaught.values()) == {0.0}


def test_iou_by_hand() -> None:
    assert iou((0, 0, 0.5, 1), (0, 0, 1, 1)) == pytest.approx(0.5)
    assert iou((0, 0, 0.2, 0.2), (0.5, 0.5, 1, 1)) == 0
