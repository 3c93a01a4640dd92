"""A backbone comes from safetensors, frozen, with a fingerprint of its content; the rest is refused with a reason."""

import json
import shutil

import families
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.import_utils import is_flash_attn_2_available

from llava_cmoe.backbones import loading
from llava_cmoe.backbones.loading import BackboneError, load_backbone, reads_images
from llava_cmoe.data.conversation import encode_sample
from llava_cmoe.settings.backbone import BackboneSettings, SiteSettings


@pytest.fixture
def folder(tiny_llava, tiny_processor, tmp_path):
    tiny_llava.save_pretrained(tmp_path / "backbone")
    tiny_processor.save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def load(path, dtype="float32"):
    return load_backbone(BackboneSettings(path=str(path), dtype=dtype))


def test_loaded_model_is_the_saved_one_frozen_in_eval_mode(folder, tiny_llava, tiny_processor):
    backbone = load(folder)
    loaded, saved = backbone.model.state_dict(), tiny_llava.state_dict()
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert not backbone.model.training and not any(weight.requires_grad for weight in backbone.model.parameters())
    assert isinstance(backbone.processor, ProcessorMixin)
    text = "USER: <image>\nWhat is it? ASSISTANT:"
    assert backbone.processor.tokenizer(text).input_ids == tiny_processor.tokenizer(text).input_ids


def test_dtype_is_the_settings(folder):
    assert {weight.dtype for weight in load(folder, "bfloat16").model.parameters()} == {torch.bfloat16}


def test_fingerprint_follows_the_content_not_the_place(folder, tmp_path):
    first = load(folder).fingerprint
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert load(moved).fingerprint == first
    weights = load_file(moved / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert load(moved).fingerprint != first
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "HUMAN"))
    assert load(folder).fingerprint != first


def test_pocket_is_the_folder_in_the_package(folder, monkeypatch):
    monkeypatch.setattr(loading, "POCKET_DIR", folder)
    assert load("pocket").fingerprint == load(folder).fingerprint


@pytest.mark.parametrize("path", ["/no/such/folder", "nobody/no-such-model"])
def test_missing_folder_is_named(path):
    with pytest.raises(BackboneError, match=f"backbone.path {path}: no such folder"):
        load(path)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_an_attention_kernel_that_is_not_installed_is_named_before_anything_is_read():
    settings = BackboneSettings(path="/no/such/folder", attention="flash_attention_2", dtype="bfloat16")
    with pytest.raises(BackboneError, match="needs the package flash-attn .*set backbone.attention: sdpa"):
        load_backbone(settings)


def test_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="no config.json"):
        load(tmp_path)


def test_unknown_and_unfit_architectures_are_refused(folder, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vision")
    with pytest.raises(BackboneError, match="model_type clip_vision_model is neither an image-text-to-text model"):
        load(tmp_path / "vision")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "made-up"}))
    with pytest.raises(BackboneError, match="not an architecture that transformers knows"):
        load(folder)


def test_a_causal_language_model_is_a_backbone_that_reads_text_alone(folder, tmp_path):
    path = families.make("llama").save(tmp_path / "text")
    backbone = load(path)
    assert isinstance(backbone.processor, PreTrainedTokenizerBase)
    assert not reads_images(BackboneSettings(path=str(path))) and reads_images(BackboneSettings(path=str(folder)))


def test_a_tokenizer_without_padding_pads_with_the_end(tmp_path):
    made = families.make("llama")
    made.processor.pad_token = None
    tokenizer = load(made.save(tmp_path / "text")).processor
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_paligemma_is_published_without_a_chat_template_and_gets_one(tmp_path):
    path = families.make("paligemma").save(tmp_path / "paligemma")
    (path / "chat_template.jinja").unlink()
    processor = load_backbone(BackboneSettings(path=str(path), attention="eager")).processor
    turns = [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "a cat"}]
    tokens = encode_sample(processor, turns, Image.new("RGB", (24, 24)), max_length=64)["input_ids"]
    assert processor.tokenizer.decode(tokens) == "<image><image><image><image><s>What?\na cat</s>"
    turns[0]["text"] = "What?"
    assert processor.tokenizer.decode(encode_sample(processor, turns, None, 64)["input_ids"]) == "<s>What?\na cat</s>"


@pytest.mark.parametrize("kind", ["llama", "llava_next"])
def test_a_backbone_without_a_chat_template_is_refused(tmp_path, kind):
    made = families.make(kind)
    path = made.save(tmp_path / kind)
    (path / "chat_template.jinja").unlink()
    with pytest.raises(BackboneError, match="no chat template; put one into the folder, as chat_template.jinja"):
        load(path)


def test_names_of_sites_that_are_not_there_are_refused_before_the_weights_are_read(tmp_path):
    path = families.make("codegen").save(tmp_path / "text")
    (path / "model.safetensors").write_bytes(b"not read")
    names = SiteSettings(layers="transformer.h", ffn="mlp", ffn_linears=("fc1",))
    with pytest.raises(BackboneError, match="there is no linear transformer.h.0.mlp.fc1"):
        load_backbone(BackboneSettings(path=str(path), sites=names))


def test_an_attention_that_the_model_does_not_have_is_refused(tmp_path):
    path = families.make("codegen").save(tmp_path / "text")
    with pytest.raises(BackboneError, match="set backbone.attention to eager"):
        load_backbone(BackboneSettings(path=str(path)))


def test_code_in_the_folder_is_never_run(folder, tmp_path):
    witness = tmp_path / "it_ran"
    (folder / "remote.py").write_text(f"open({str(witness)!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    remote = {"AutoConfig": "remote.C", "AutoModelForImageTextToText": "remote.C"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "made-up", "auto_map": remote}))
    with pytest.raises(BackboneError, match="made-up|custom code"):
        load(folder)
    assert not witness.exists()


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="no \\*.safetensors"):
        load(folder)


def test_incomplete_weights_are_an_error_not_random_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("down_proj.weight"))
    save_file({name: weights[name] for name in weights if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="incomplete, the weights lack .*down_proj.weight"):
        load(folder)


def test_bare_tokenizer_is_no_processor(folder):
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(BackboneError, match="processor"):
        load(folder)


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-9], lambda whole: b"\xff" + whole[1:], lambda whole: b"text\n"]
)
def test_damaged_weights_are_named(folder, damage):
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(BackboneError, match="its weights are damaged"):
        load(folder)
