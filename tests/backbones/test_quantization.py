"""The LLM's linears are held in few bits, nothing else is, and answering leaves no trace in them."""

import pytest
import torch
from torch import Tensor, nn

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.backbones.sites import linear_sites
from llava_cmoe.settings.backbone import BackboneSettings

BYTES = {"8bit": 1, "nf4": 0.5}


@pytest.fixture(params=BYTES)
def quantization(request: pytest.FixtureRequest) -> str:
    return request.param


def load(quantization: str, **settings: str) -> nn.Module:
    return load_backbone(BackboneSettings(quantization=quantization, **settings)).model


def gradient(model: nn.Module) -> Tensor:
    """Of a sum of squared logits, with respect to what enters the first layer."""
    ids_BT = torch.arange(24).view(2, 12)
    entering = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
    model.train()(inputs_embeds=entering).logits.square().sum().backward()
    model.eval()
    return entering.grad


def test_the_linears_of_the_llm_and_nothing_else(quantization: str):
    model, whole = load(quantization), load("none")
    sites = {f"{site.name}.weight" for site in linear_sites(model)}
    assert {name for name, value in model.named_parameters() if value.dtype in (torch.uint8, torch.int8)} == sites
    for name, value in whole.named_parameters():
        held = model.get_parameter(name)
        if name in sites:
            assert held.nbytes == value.numel() * BYTES[quantization] and not held.requires_grad
        else:
            assert torch.equal(held, value)


def test_the_rest_has_the_dtype_of_the_settings(quantization: str):
    model = load(quantization, dtype="bfloat16")
    dtypes = {value.dtype for value in model.parameters() if value.is_floating_point()}
    assert dtypes == {torch.bfloat16}
    with torch.no_grad():
        assert model(input_ids=torch.arange(9)[None]).logits.dtype == torch.bfloat16


def test_the_logits_are_near_those_of_the_whole_weights(quantization: str):
    ids_BT = torch.arange(40, 60)[None]
    with torch.no_grad():
        whole, rounded = (load(kind)(input_ids=ids_BT).logits for kind in ("none", quantization))
    error = (rounded - whole).norm() / whole.norm()
    assert 0 < error < {"8bit": 0.1, "nf4": 0.3}[quantization]


def test_answering_changes_neither_bytes_nor_gradients(quantization: str):
    model = load(quantization)
    bytes_before = {name: value.clone() for name, value in model.state_dict().items()}
    gradient_before = gradient(model)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(9)[None]).logits
    assert torch.equal(gradient(model), gradient_before) and gradient_before.any()
    assert all(torch.equal(value, bytes_before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(9)[None]).logits, logits)


def test_parameters_are_counted_whole(quantization: str):
    assert load(quantization).num_parameters() == load("none").num_parameters()
