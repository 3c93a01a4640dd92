"""The locator's feature is the stock model's own hidden state, whatever the padding, at the cost of layers below it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava_cmoe.backbones.features import feature_in_passing, feature_width, prompt_feature

last_token_feature = partial(prompt_feature, feature="last")

TEXTS = ("<image>\nWhat is the object in the image?", "<image>\nIs the ball red?", "<image>\nWhere is it? Say a word.")
LAYERS = (0, 1, 2)


def collate(processor, texts, side="right"):
    """A padded batch of prompts, each about a picture of its own colour."""
    images = [Image.new("RGB", (24, 24), (80 * len(text) % 256, len(text), 7)) for text in texts]
    return dict(processor(text=list(texts), images=images, padding=True, padding_side=side, return_tensors="pt"))


def counting(model):
    """Counts the finished calls of every LLM layer and of the lm_head."""
    calls = SimpleNamespace(layers=[0] * len(model.get_decoder().layers), lm_head=0)
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(lambda *_, index=index: calls.layers.__setitem__(index, calls.layers[index] + 1))
    model.lm_head.register_forward_hook(lambda *_: setattr(calls, "lm_head", calls.lm_head + 1))
    return calls


@pytest.mark.parametrize("layer", LAYERS)
def test_feature_is_the_full_forwards_hidden_state_bit_for_bit(tiny_llava, tiny_processor, layer):
    batch = collate(tiny_processor, TEXTS)
    with torch.no_grad():
        hidden_BTD = tiny_llava(**batch, output_hidden_states=True).hidden_states[layer]
    last_B = batch["attention_mask"].sum(1) - 1
    assert len(set(last_B.tolist())) == len(TEXTS)  # the prompts differ in length, so padding matters
    assert torch.equal(last_token_feature(tiny_llava, batch, layer), hidden_BTD[torch.arange(len(TEXTS)), last_B])


def test_minus_one_is_the_last_layer_after_the_final_norm(tiny_llava, tiny_processor):
    batch = collate(tiny_processor, TEXTS)
    assert torch.equal(last_token_feature(tiny_llava, batch, -1), last_token_feature(tiny_llava, batch, 2))
    assert torch.equal(last_token_feature(tiny_llava, batch, -2), last_token_feature(tiny_llava, batch, 1))


@pytest.mark.parametrize("layer", LAYERS)
def test_padding_side_and_length_leave_the_same_bits(tiny_llava, tiny_processor, layer):
    right = collate(tiny_processor, TEXTS)
    wider = {
        name: torch.nn.functional.pad(right[name], (3, 4), value=value)
        for name, value in (("input_ids", tiny_processor.tokenizer.pad_token_id), ("attention_mask", 0))
    }
    feature_BD = last_token_feature(tiny_llava, right, layer)
    assert torch.equal(feature_BD, last_token_feature(tiny_llava, collate(tiny_processor, TEXTS, "left"), layer))
    assert torch.equal(feature_BD, last_token_feature(tiny_llava, right | wider, layer))


@pytest.mark.parametrize("layer", LAYERS)
def test_batch_mates_do_not_matter(tiny_llava, tiny_processor, layer):
    together_BD = last_token_feature(tiny_llava, collate(tiny_processor, TEXTS, "left"), layer)
    alone_BD = torch.cat([last_token_feature(tiny_llava, collate(tiny_processor, [text]), layer) for text in TEXTS])
    torch.testing.assert_close(together_BD, alone_BD, rtol=1e-5, atol=1e-6)
    assert (together_BD[0] - together_BD[2]).abs().max() > 1e-3


def test_picture_reaches_the_feature_of_every_layer_but_the_embedding(tiny_llava, tiny_processor):
    batch = collate(tiny_processor, TEXTS)
    repainted = batch | {"pixel_values": -batch["pixel_values"]}
    for layer, changes in zip(LAYERS, (False, True, True), strict=True):
        before_BD, after_BD = (last_token_feature(tiny_llava, inputs, layer) for inputs in (batch, repainted))
        assert torch.equal(before_BD, after_BD) != changes


def test_text_only_prompts_have_a_feature(tiny_llava, tiny_processor):
    batch = dict(tiny_processor(text=["Yes or no?", "Which letter is it?"], padding=True, return_tensors="pt"))
    assert last_token_feature(tiny_llava, batch, 1).shape == (2, 32)


@pytest.mark.parametrize("layer", LAYERS)
def test_only_the_layers_below_run_and_never_the_lm_head(tiny_llava, tiny_processor, layer):
    calls = counting(tiny_llava)
    last_token_feature(tiny_llava, collate(tiny_processor, TEXTS), layer)
    assert calls.layers == [1] * layer + [0] * (2 - layer)
    assert calls.lm_head == 0


def test_model_is_left_as_it_was(tiny_llava, tiny_processor):
    batch = collate(tiny_processor, TEXTS)
    with torch.no_grad():
        before_BTV = tiny_llava(**batch).logits
        last_token_feature(tiny_llava, batch, 0)
        assert torch.equal(before_BTV, tiny_llava(**batch).logits)


def test_feature_is_float32_without_gradient(tiny_llava, tiny_processor):
    feature_BD = last_token_feature(tiny_llava.to(torch.bfloat16), collate(tiny_processor, TEXTS), 1)
    assert feature_BD.dtype == torch.float32 and not feature_BD.requires_grad


def test_answers_and_impossible_layers_are_refused(tiny_llava, tiny_processor):
    batch = collate(tiny_processor, TEXTS)
    with pytest.raises(ValueError, match="without answers"):
        last_token_feature(tiny_llava, batch | {"labels": batch["input_ids"]}, 1)
    for layer in (3, -4):
        with pytest.raises(ValueError, match=f"layer {layer} does not exist: this model has 0 .* to 2"):
            last_token_feature(tiny_llava, batch, layer)
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="prompt 1 of the batch is empty"):
        last_token_feature(tiny_llava, batch, 1)


# Means over tokens.

MEANS = ("mean", "vision", "text")
NUM_IMAGE_TOKENS = 4


def token_masks(batch, image_token):
    real_BT, image_BT = batch["attention_mask"].bool(), batch["input_ids"] == image_token
    return {"mean": real_BT, "vision": real_BT & image_BT, "text": real_BT & ~image_BT}


@pytest.mark.parametrize("feature", MEANS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_mean_is_over_its_tokens_of_the_stock_models_states(tiny_llava, tiny_processor, layer, feature):
    batch = collate(tiny_processor, TEXTS)
    chosen_BT = token_masks(batch, tiny_llava.config.image_token_id)[feature]
    with torch.no_grad():
        hidden_BTD = tiny_llava(**batch, output_hidden_states=True).hidden_states[layer]
    expected_BD = torch.stack(
        [states[chosen].mean(dim=0) for states, chosen in zip(hidden_BTD, chosen_BT, strict=True)]
    )
    feature_BD = prompt_feature(tiny_llava, batch, layer, feature)
    torch.testing.assert_close(feature_BD, expected_BD, rtol=1e-5, atol=1e-6)
    assert feature_BD.dtype == torch.float32 and not feature_BD.requires_grad


def test_all_tokens_are_the_images_and_the_others(tiny_llava, tiny_processor):
    batch = collate(tiny_processor, TEXTS)
    num_B1 = batch["attention_mask"].sum(dim=1, keepdim=True)
    mean_BD, vision_BD, text_BD = (prompt_feature(tiny_llava, batch, 1, feature) for feature in MEANS)
    together_BD = (NUM_IMAGE_TOKENS * vision_BD + (num_B1 - NUM_IMAGE_TOKENS) * text_BD) / num_B1
    torch.testing.assert_close(together_BD, mean_BD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("feature", (*MEANS, "both"))
@pytest.mark.parametrize("layer", LAYERS)
def test_a_mean_has_the_same_bits_whatever_the_padding(tiny_llava, tiny_processor, layer, feature):
    right = collate(tiny_processor, TEXTS)
    wider = {
        name: torch.nn.functional.pad(right[name], (3, 4), value=value)
        for name, value in (("input_ids", tiny_processor.tokenizer.pad_token_id), ("attention_mask", 0))
    }
    feature_BD = prompt_feature(tiny_llava, right, layer, feature)
    left = collate(tiny_processor, TEXTS, "left")
    assert torch.equal(feature_BD, prompt_feature(tiny_llava, left, layer, feature))
    assert torch.equal(feature_BD, prompt_feature(tiny_llava, right | wider, layer, feature))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("feature", (*MEANS, "both"))
def test_batch_mates_do_not_matter_for_a_mean(tiny_llava, tiny_processor, layer, feature):
    together_BD = prompt_feature(tiny_llava, collate(tiny_processor, TEXTS, "left"), layer, feature)
    alone_BD = torch.cat(
        [prompt_feature(tiny_llava, collate(tiny_processor, [text]), layer, feature) for text in TEXTS]
    )
    torch.testing.assert_close(together_BD, alone_BD, rtol=1e-5, atol=1e-6)


def test_taking_a_mean_adds_no_dependence_on_batch_mates(tiny_llava, tiny_processor):
    """Embeddings of words do not know their mates; nor does their mean, though its sum runs over other lengths."""
    texts = [f"<image>\n{'What is it? ' * num}" for num in range(1, 30, 4)]
    together_BD = prompt_feature(tiny_llava, collate(tiny_processor, texts, "left"), 0, "text")
    alone_BD = torch.cat([prompt_feature(tiny_llava, collate(tiny_processor, [text]), 0, "text") for text in texts])
    assert torch.equal(together_BD, alone_BD)


def test_only_states_that_can_see_the_picture_depend_on_it(tiny_llava, tiny_processor):
    batch = collate(tiny_processor, TEXTS)
    repainted = batch | {"pixel_values": -batch["pixel_values"]}
    for layer in LAYERS:
        for feature in (*MEANS, "both"):
            before_BD, after_BD = (prompt_feature(tiny_llava, inputs, layer, feature) for inputs in (batch, repainted))
            assert torch.equal(before_BD, after_BD) == (layer == 0 and feature == "text")


def test_vision_depends_on_the_picture_alone(tiny_llava, tiny_processor):
    """The image comes first in these prompts, and a causal model's image tokens do not see the question."""
    picture = collate(tiny_processor, TEXTS[:1])["pixel_values"]
    asked, otherwise = (collate(tiny_processor, [text]) | {"pixel_values": picture} for text in TEXTS[:2])
    for layer in LAYERS:
        feature_BD = prompt_feature(tiny_llava, asked, layer, "vision")
        torch.testing.assert_close(feature_BD, prompt_feature(tiny_llava, otherwise, layer, "vision"))


def test_vision_of_a_prompt_without_a_picture_is_zeros(tiny_llava, tiny_processor):
    texts = [TEXTS[0], "Yes or no?"]
    image = Image.new("RGB", (24, 24))
    mixed = dict(tiny_processor(text=texts, images=[image], padding=True, return_tensors="pt"))
    with_picture_D, without_D = prompt_feature(tiny_llava, mixed, 1, "vision")
    assert with_picture_D.any() and not without_D.any()


@pytest.mark.parametrize("layer", LAYERS)
def test_both_has_picture_and_words_side_by_side_each_at_the_same_scale(tiny_llava, tiny_processor, layer):
    texts, image = [*TEXTS[:2], "Yes or no?"], Image.new("RGB", (24, 24), (9, 90, 200))
    mixed = dict(tiny_processor(text=texts, images=[image, image], padding=True, return_tensors="pt"))
    both_BD = prompt_feature(tiny_llava, mixed, layer, "both")
    assert both_BD.shape == (3, feature_width(tiny_llava, "both")) and both_BD.dtype == torch.float32
    for half_BD, feature in zip(both_BD.chunk(2, dim=1), ("vision", "text"), strict=True):
        part_BD = prompt_feature(tiny_llava, mixed, layer, feature)
        expected_BD = torch.nn.functional.layer_norm(part_BD, (feature_width(tiny_llava, feature),))
        assert torch.equal(half_BD, expected_BD)
    assert not both_BD[2].chunk(2)[0].any()  # a prompt without a picture


def test_a_model_of_text_alone_has_words_and_no_picture(tiny_llava, tiny_processor):
    batch = dict(tiny_processor(text=["Yes or no?"], return_tensors="pt"))
    language_model = tiny_llava.model.language_model
    words_BD, all_BD = (prompt_feature(language_model, batch, 1, feature) for feature in ("text", "mean"))
    assert torch.equal(words_BD, all_BD)
    for feature in ("vision", "both"):
        with pytest.raises(ValueError, match="a llama reads no pictures; set locator.feature to last, mean or text"):
            prompt_feature(language_model, batch, 1, feature)


# Read in passing.


def passing(model, batch, layer, feature):
    """The features handed over in two forward passes, and the logits of the first."""
    seen = []
    with torch.no_grad(), feature_in_passing(model, batch, layer, feature, seen.append):
        logits_BTV = model(**batch).logits
        model(**batch)
    return seen, logits_BTV


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("feature", ["last", "mean", "vision", "text", "both"])
def test_without_padding_to_move_the_feature_in_passing_has_the_same_bits(tiny_llava, tiny_processor, layer, feature):
    batch = collate(tiny_processor, TEXTS)
    (feature_BD,), logits_BTV = passing(tiny_llava, batch, layer, feature)
    assert torch.equal(feature_BD, prompt_feature(tiny_llava, batch, layer, feature))
    with torch.no_grad():
        assert torch.equal(logits_BTV, tiny_llava(**batch).logits)


@pytest.mark.parametrize("feature", ["last", "mean", "vision", "text", "both"])
def test_padding_on_the_left_moves_the_feature_in_passing_by_rounding_only(tiny_llava, tiny_processor, feature):
    batch = collate(tiny_processor, TEXTS, "left")
    (feature_BD,), _ = passing(tiny_llava, batch, 1, feature)
    torch.testing.assert_close(feature_BD, prompt_feature(tiny_llava, batch, 1, feature), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [2, -1])
def test_a_state_that_enters_no_layer_is_not_read_in_passing(tiny_llava, tiny_processor, layer):
    with pytest.raises(ValueError, match=f"no LLM layer {layer} .* this model has 0 to 1"):
        passing(tiny_llava, collate(tiny_processor, TEXTS), layer, "last")
