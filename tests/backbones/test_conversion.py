"""LLaVA's own layout becomes the model that its parts are, put together by hand; what does not fit is named."""

import io
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from commands import refused, type_in
from hypothesis import given, settings
from hypothesis import strategies as st
from original import PATCH, SIDE, VOCABULARY, WIDTH, write_parts
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from llava_cmoe.backbones.conversion import _load_projector, convert
from llava_cmoe.backbones.loading import Backbone, BackboneError, load_backbone
from llava_cmoe.data.conversation import encode_prompt, encode_sample, split
from llava_cmoe.settings.backbone import BackboneSettings

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = [{"role": "user", "text": "<image>\nWhat is it ?"}]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


@pytest.fixture(scope="module")
def converted(parts: Path) -> Path:
    out = parts / "out" / "llava"
    convert(parts / "llm", parts / "mm_projector.bin", parts / "vision", out)
    return out


@pytest.fixture(scope="module")
def backbone(converted: Path) -> Backbone:
    return load_backbone(BackboneSettings(path=str(converted), attention="eager"))


def by_hand(parts: Path, ids_T: torch.Tensor, pixels: torch.Tensor, image_token: int) -> torch.Tensor:
    """Logits (T, V) of the LLM on a prompt whose image tokens are the projected patches of the picture."""
    llm = LlamaForCausalLM.from_pretrained(parts / "llm", dtype=torch.float32, attn_implementation="eager")
    vision = CLIPVisionModel.from_pretrained(parts / "vision", dtype=torch.float32, attn_implementation="eager")
    weights = torch.load(parts / "mm_projector.bin", weights_only=True)
    given = {name.removeprefix("model.mm_projector."): tensor.float() for name, tensor in weights.items()}
    patches_PC = vision(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    hidden_PD = functional.gelu(functional.linear(patches_PC, given["0.weight"], given["0.bias"]))
    image_PD = functional.linear(hidden_PD, given["2.weight"], given["2.bias"])
    is_image_T = ids_T == image_token
    embedded_TD = llm.model.embed_tokens(ids_T.masked_fill(is_image_T, 0))
    embedded_TD[is_image_T] = image_PD
    return llm(inputs_embeds=embedded_TD[None]).logits[0]


@torch.no_grad()
def test_logits_are_those_of_the_parts_put_together_by_hand(parts: Path, backbone: Backbone):
    picture = Image.effect_noise((SIDE, SIDE), 80).convert("RGB")
    prompt = encode_prompt(backbone.processor, QUESTION, picture)
    image_token = backbone.model.config.image_token_id
    assert int((prompt["input_ids"] == image_token).sum()) == (SIDE // PATCH) ** 2
    batch = {name: tensor if name == "pixel_values" else tensor[None] for name, tensor in prompt.items()}
    logits_TV = backbone.model(**batch).logits[0]
    expected_TV = by_hand(parts, prompt["input_ids"], prompt["pixel_values"], image_token)
    assert torch.allclose(logits_TV[:, :VOCABULARY], expected_TV, atol=1e-6) and expected_TV.std() > 0.1
    # A new token's logit is the mean of the others': it is never said.
    assert bool((logits_TV[:, VOCABULARY:] < logits_TV[:, :VOCABULARY].max(dim=1, keepdim=True).values).all())


def test_every_weight_keeps_its_bits_and_its_precision(parts: Path, converted: Path, backbone: Backbone):
    written = load_file(converted / "model.safetensors")
    projector = torch.load(parts / "mm_projector.bin", weights_only=True)
    for name, path in {"0": "linear_1", "2": "linear_2"}.items():
        for kind in ("weight", "bias"):
            source = projector[f"model.mm_projector.{name}.{kind}"]
            assert identical(written[f"multi_modal_projector.{path}.{kind}"], source)
            loaded = backbone.model.state_dict()[f"model.multi_modal_projector.{path}.{kind}"]
            assert identical(loaded, source.float())
    seen = {name: tensor for name, tensor in written.items() if name.startswith("vision_tower.")}
    whole = load_file(parts / "vision/model.safetensors")
    own = {name: tensor for name, tensor in whole.items() if name.startswith("vision_model.")}
    assert len(seen) == len(own) > 30
    assert all(identical(seen[f"vision_tower.{name}"], tensor) for name, tensor in own.items())
    encoder = CLIPVisionModel.from_pretrained(parts / "vision").state_dict()
    loaded = backbone.model.model.vision_tower.state_dict()
    assert encoder.keys() == loaded.keys() and all(identical(loaded[name], encoder[name]) for name in encoder)
    for name, tensor in load_file(parts / "llm/model.safetensors").items():
        assert identical(written[f"language_model.{name}"][: len(tensor)], tensor)


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_tokens_and_rows_are_those_of_llava_1_5(backbone: Backbone):
    tokenizer, config = backbone.processor.tokenizer, backbone.model.config
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32_000, 32_001]
    assert (tokenizer.pad_token_id, config.image_token_id, config.text_config.pad_token_id) == (32_001, 32_000, 32_001)
    assert config.text_config.vocab_size == len(backbone.model.get_input_embeddings().weight) == 32_064
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert backbone.model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_conversation_is_vicunas(backbone: Backbone):
    turns = [*QUESTION, {"role": "assistant", "text": "a cat"}, {"role": "user", "text": "is it ?"}]
    turns.append({"role": "assistant", "text": "it is"})
    text = "".join(segment.text for segment in split(backbone.processor, turns))
    assert text == f"{SYSTEM} USER: <image>\nWhat is it ? ASSISTANT: a cat</s>USER: is it ? ASSISTANT: it is</s>"
    sample = encode_sample(backbone.processor, turns, Image.new("RGB", (SIDE, SIDE)), max_length=200)
    learned = sample["labels"][sample["labels"] >= 0]
    assert backbone.processor.tokenizer.decode(learned).split() == "a cat </s> it is </s>".split()


def test_a_vision_encoder_of_its_own_does_as_well_as_a_whole_clip(parts: Path, converted: Path, tmp_path: Path):
    alone = shutil.copytree(parts / "vision", tmp_path / "vision")
    CLIPVisionModel.from_pretrained(parts / "vision").save_pretrained(alone)
    convert(parts / "llm", parts / "mm_projector.bin", alone, tmp_path / "out")
    one, other = (load_file(folder / "model.safetensors") for folder in (converted, tmp_path / "out"))
    assert one.keys() == other.keys() and all(identical(one[name], other[name]) for name in one)


class Code:
    """What a malicious file would run."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.witness),)


def test_code_in_the_projectors_file_is_never_run(parts: Path, tmp_path: Path):
    torch.save({"model.mm_projector.0.weight": Code(tmp_path / "ran")}, tmp_path / "mm_projector.bin")
    told = refused(*words(parts, tmp_path, projector=tmp_path / "mm_projector.bin"))
    assert "not a file of tensors alone" in told and not (tmp_path / "ran").exists()


def words(parts: Path, tmp_path: Path, **other: Path) -> list[object]:
    given = {"llm": parts / "llm", "projector": parts / "mm_projector.bin", "vision": parts / "vision"}
    given |= {"out": tmp_path / "out", **other}
    return ["convert", *(word for name, path in given.items() for word in (f"--{name}", path))]


def test_the_command_converts_once(parts: Path, tmp_path: Path):
    result = type_in(*words(parts, tmp_path))
    assert result.exit_code == 0, result.output
    assert load_backbone(BackboneSettings(path=str(tmp_path / "out"))).fingerprint
    assert "exists already" in refused(*words(parts, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, "lacks model.mm_projector.0.bias"),
        (
            {"2.weight": torch.zeros(WIDTH, 40)},
            "2.weight is (32, 40), this LLM (width 32) and vision encoder (width 24)",
        ),
        ({"4.weight": torch.zeros(1)}, "4.weight is no part of LLaVA-1.5's projector"),
    ],
)
def test_a_projector_that_does_not_fit_is_named(change: dict[str, object], message: str, parts: Path, tmp_path: Path):
    given = torch.load(parts / "mm_projector.bin", weights_only=True)
    given |= {f"model.mm_projector.{name}": tensor for name, tensor in change.items()}
    file = tmp_path / "mm_projector.bin"
    torch.save({name: tensor for name, tensor in given.items() if tensor is not None}, file)
    told = refused(*words(parts, tmp_path, projector=file))
    assert str(file) in told and message in told and not (tmp_path / "out").exists()


def test_a_part_that_cannot_be_used_is_named(parts: Path, tmp_path: Path):
    assert "cannot read the file" in refused(*words(parts, tmp_path, projector=tmp_path / "no.bin"))
    assert f"{tmp_path}: no config.json" in refused(*words(parts, tmp_path, llm=tmp_path))
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 8}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    assert "model_type gpt2; LLaVA-1.5's LLM is a llama" in refused(*words(parts, tmp_path, llm=tmp_path / "gpt2"))
    assert "vision encoder is CLIP's" in refused(*words(parts, tmp_path, vision=parts / "llm"))
    blind = shutil.copytree(parts / "vision", tmp_path / "blind")
    (blind / "preprocessor_config.json").unlink()
    assert "no preprocessor_config.json" in refused(*words(parts, tmp_path, vision=blind))
    pickled = shutil.copytree(parts / "llm", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "no *.safetensors, and other weights are not read" in refused(*words(parts, tmp_path, llm=pickled))
    (pickled / "tokenizer.json").unlink()
    assert "its tokenizer cannot be loaded" in refused(*words(parts, tmp_path, llm=pickled))


def saved(zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"mm_projector.0.weight": torch.ones(3, 3)}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


PICKLED = st.lists(st.sampled_from(list(b"abgIJKLMNOPQRSTUVX()012.\n}]{[tues\x80\x81\x85")), max_size=40).map(bytes)
TEXTS = st.text(max_size=60).map(str.encode) | st.just(b"version https://git-lfs.github.com/spec/v1\n")


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_is_no_projector_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "projector.bin"
    content = bytearray(saved(data.draw(st.booleans())))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(
        data.draw(TEXTS | PICKLED | st.just(bytes(content)) | st.integers(0, 99).map(lambda n: content[:n]))
    )
    with warnings.catch_warnings(action="ignore"):
        try:
            assert all(isinstance(one, torch.Tensor) for one in _load_projector(file).values())
        except BackboneError as error:
            assert str(error).startswith(f"{file}: not ") and "\n" not in str(error)
