import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from llava_cmoe.backbones.sites import Site, ffn_sites, linear_sites


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
def test_every_site_exists_and_its_first_linear_reads_the_sites_input(
    backbone: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(backbone)
    hidden_size = model.config.get_text_config().hidden_size
    for site in ffn_sites(model):
        linears = [model.get_submodule(f"{site.name}.{path}") for path in site.linears]
        assert all(isinstance(linear, nn.Linear) for linear in linears) and linears[0].in_features == hidden_size


def test_an_unknown_architecture_is_named_with_the_known_ones(tiny_llava: LlavaForConditionalGeneration) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8))
    with pytest.raises(ValueError, match="'gpt2'; known: llama, llava"):
        ffn_sites(gpt2)
    tiny_llava.config.text_config = gpt2.config
    with pytest.raises(ValueError, match="LLM of type 'gpt2'; known: llama"):
        linear_sites(tiny_llava)
