from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from llava_cmoe.backbones.sites import (
    Site,
    attention_sites,
    ffn_sites,
    linear_sites,
    llm_layers,
    name_sites,
    projector_sites,
    vision_sites,
)
from llava_cmoe.settings.backbone import SiteSettings
from llava_cmoe.settings.base import RecipeError


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=32)
    )


def test_ffn_sites_are_the_llms_ffns_in_order_of_depth(
    tiny_llava: LlavaForConditionalGeneration, tiny_llama: LlamaForCausalLM
) -> None:
    linears = ("gate_proj", "up_proj", "down_proj")
    assert ffn_sites(tiny_llava) == tuple(Site(f"model.language_model.layers.{i}.mlp", i, linears) for i in range(2))
    assert ffn_sites(tiny_llama) == tuple(Site(f"model.layers.{i}.mlp", i, linears) for i in range(3))


@pytest.mark.parametrize("backbone", ["tiny_llava", "tiny_llama"])
def test_linear_sites_are_all_linears_of_the_llms_layers_and_no_others(
    backbone: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(backbone)
    layers = "model.language_model.layers." if backbone == "tiny_llava" else "model.layers."
    expected = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(layers)}
    sites = linear_sites(model)
    assert {site.name for site in sites} == expected and len(sites) == len(expected)
    assert all(site.linears == ("",) for site in sites)
    assert [site.layer for site in sites] == sorted(site.layer for site in sites)


@pytest.mark.parametrize("backbone", ["tiny_llava", "tiny_llama"])
def test_attention_and_ffn_sites_hold_all_linears_of_the_llms_layers(
    backbone: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(backbone)
    sites = (*attention_sites(model), *ffn_sites(model))
    assert sorted(f"{site.name}.{path}" for site in sites for path in site.linears) == sorted(
        site.name for site in linear_sites(model)
    )
    assert [site.layer for site in attention_sites(model)] == list(range(len(llm_layers(model))))


@pytest.mark.parametrize("linears", [(), ("q_proj", "v_proj"), ("self_attn.q_proj", "cross_attn.v_proj")])
def test_attention_linears_without_a_common_block_are_refused(
    tiny_llama: LlamaForCausalLM, linears: tuple[str, ...]
) -> None:
    names = SiteSettings(layers="model.layers", ffn="mlp", ffn_linears=("gate_proj",), attention_linears=linears)
    name_sites(tiny_llama, names)
    with pytest.raises(RecipeError, match="its attention linears lie in no common block"):
        attention_sites(tiny_llama)


@pytest.mark.parametrize("backbone", ["tiny_llava", "tiny_llama"])
def test_every_site_exists_and_its_first_linear_reads_the_sites_input(
    backbone: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(backbone)
    hidden_size = model.config.get_text_config().hidden_size
    for site in ffn_sites(model):
        linears = [model.get_submodule(f"{site.name}.{path}") for path in site.linears]
        assert all(isinstance(linear, nn.Linear) for linear in linears) and linears[0].in_features == hidden_size


@torch.no_grad()
def features(model: LlavaForConditionalGeneration) -> Tensor:
    """What the LLM is given of a picture."""
    pixel_values = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return model.get_image_features(pixel_values).pooler_output[0]


@pytest.mark.parametrize(
    ("chosen", "reached"),
    [(-1, {0, 1}), (-2, {0}), (2, {0, 1}), (1, {0}), ([0, 1], {0}), ([-1, 0], {0, 1})],
)
def test_vision_sites_are_the_ffns_that_reach_the_llm_and_no_others(
    tiny_llava: LlavaForConditionalGeneration, chosen: int | list[int], reached: set[int]
) -> None:
    tiny_llava.config.vision_feature_layer = chosen
    wide = len(chosen) if isinstance(chosen, list) else 1
    tiny_llava.model.multi_modal_projector.linear_1 = nn.Linear(32 * wide, 32)
    sites = {site.name: site for site in vision_sites(tiny_llava)}
    assert [site.layer for site in sites.values()] == sorted(reached)
    for layer in range(2):
        name = f"model.vision_tower.encoder.layers.{layer}.mlp"
        before, ffn = features(tiny_llava), tiny_llava.get_submodule(name)
        ffn.fc2.bias.data += torch.linspace(0, 1, 32)
        assert (not torch.equal(features(tiny_llava), before)) == (layer in reached) == (name in sites)


def test_sites_before_the_llm_read_images_and_their_first_linear_reads_the_sites_input(
    tiny_llava: LlavaForConditionalGeneration,
) -> None:
    sites = (*vision_sites(tiny_llava), *projector_sites(tiny_llava))
    assert sites[-1].name == "model.multi_modal_projector"
    for site in sites:
        inside = [
            path for path, module in tiny_llava.get_submodule(site.name).named_modules() if hasattr(module, "weight")
        ]
        assert site.of_images and list(site.linears) == inside  # all linears, in the order in which they run
        assert tiny_llava.get_submodule(f"{site.name}.{site.linears[0]}").in_features == 32
    assert not any(site.of_images for site in (*ffn_sites(tiny_llava), *linear_sites(tiny_llava)))


def test_an_architecture_without_known_image_path_is_named_with_the_known_ones(
    tiny_llava: LlavaForConditionalGeneration, tiny_llama: LlamaForCausalLM
) -> None:
    for sites in (vision_sites, projector_sites):
        with pytest.raises(RecipeError, match="'llama'; known: gemma3, .*, smolvlm. Leave experts.also_in empty"):
            sites(tiny_llama)
    del tiny_llava.model.vision_tower.encoder
    with pytest.raises(
        RecipeError, match="in a vision encoder of type 'clip_vision_model' in a llava; leave vision out"
    ):
        vision_sites(tiny_llava)


def test_a_projector_without_linears_is_left_out() -> None:
    with pytest.raises(RecipeError, match="the projector of a gemma3 holds no linear; leave projector out"):
        projector_sites(families.make("gemma3").model)


NAMES = SiteSettings(
    layers="transformer.h",
    ffn="mlp",
    ffn_linears=("fc_in", "fc_out"),
    attention_linears=("attn.qkv_proj", "attn.out_proj"),
)
"""Those of CodeGen."""


def test_an_unknown_architecture_gets_an_error_that_says_how_to_name_its_sites() -> None:
    model = families.make("codegen").model
    for sites in (ffn_sites, linear_sites):
        with pytest.raises(
            RecipeError, match="type 'codegen'.*no list `layers`. Name the .* backbone.sites: {layers: "
        ):
            sites(model)


def test_sites_are_where_the_recipe_names_them() -> None:
    model = families.make("codegen").model
    name_sites(model, NAMES)
    assert ffn_sites(model) == tuple(Site(f"transformer.h.{i}.mlp", i, ("fc_in", "fc_out")) for i in range(2))
    inside = {name for name, m in model.transformer.h.named_modules() if isinstance(m, nn.Linear)}
    assert {site.name for site in linear_sites(model)} == {f"transformer.h.{name}" for name in inside}
    assert llm_layers(model) is model.transformer.h


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": "transformer.layers"}, "transformer.layers is no list of layers"),
        ({"layers": "transformer.wte"}, "transformer.wte is no list of layers"),
        ({"ffn": "ffn"}, "there is no linear transformer.h.0.ffn.fc_in"),
        ({"ffn_linears": ("fc_in", "act")}, "there is no linear transformer.h.0.mlp.act"),
        ({"ffn_linears": ("fc_out", "fc_in")}, "transformer.h.0.mlp.fc_out reads 64 features where the LLM has 32"),
        ({"attention_linears": ("attn.q_proj",)}, "there is no linear transformer.h.0.attn.q_proj"),
    ],
)
def test_names_that_the_model_does_not_have_are_refused_one_by_one(change: dict[str, Any], reason: str) -> None:
    model = families.make("codegen").model
    name_sites(model, NAMES.model_copy(update=change))
    with pytest.raises(RecipeError, match=reason):
        (*ffn_sites(model), *linear_sites(model))
