"""A backbone's special tokens are refused in every text that it reads; whatever merely looks like one is text."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
from hypothesis import assume, given
from hypothesis import strategies as st

from llava_cmoe import sequence
from llava_cmoe.chat.session import ChatSession
from llava_cmoe.data.check import check_sequence
from llava_cmoe.data.conversation import encode_prompt, encode_sample, tokenizer_of
from llava_cmoe.data.problems import DataError
from llava_cmoe.data.rows import Turn
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.data.special_tokens import special_texts, why_special

FAMILIES = [*families.WITH_IMAGES, "llama"]
KNOWN = {
    "qwen2_5_vl": ("<|image_pad|>", "<|im_end|>", "<|vision_start|>", "</s>", "<pad>"),
    "gemma3": ("<image_soft_token>", "<end_of_turn>", "</s>"),
    "idefics3": ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    "internvl": ("<IMG_CONTEXT>", "<|im_end|>"),
    "llava_next": ("</s>", "<s>"),
    "paligemma": ("</s>",),
    "llama": ("</s>", "<|im_end|>"),
}


@cache
def processor_of(kind: str) -> Any:
    return families.make(kind).processor


EVERYWHERE = sorted({token for kind in FAMILIES for token in special_texts(processor_of(kind))})


@pytest.mark.parametrize("kind", KNOWN)
def test_special_tokens_are_known(kind: str) -> None:
    special = special_texts(processor_of(kind))
    own = set(KNOWN[kind]) - ({"<|im_end|>"} if kind == "llama" and "<|im_end|>" not in special else set())
    assert own <= special


@pytest.mark.parametrize("kind", FAMILIES)
@given(data=st.data())
def test_what_is_not_refused_is_encoded_as_text(kind: str, data: st.DataObject) -> None:
    """Tokens of other families, and spellings a letter away, become no special token anywhere in a row."""
    processor = processor_of(kind)
    tokenizer, special = tokenizer_of(processor), special_texts(processor)
    token = data.draw(st.sampled_from(EVERYWHERE))
    place = data.draw(st.integers(0, len(token)))
    near = token[:place] + data.draw(st.sampled_from(["", " ", "-", "X"])) + token[place:]
    assume("<image>" not in near)  # the marker of a row's picture, which the file's reader counts
    texts = [data.draw(st.sampled_from(["what", "is it "])) + near, "a" + near + "b"]
    turns: list[Turn] = [{"role": role, "text": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    plain: list[Turn] = [{"role": "user", "text": "what"}, {"role": "assistant", "text": "ab"}]
    ids = {tokenizer.convert_tokens_to_ids(text) for text in special} - {None, tokenizer.unk_token_id}

    def count(turns: list[Turn]) -> int:
        return sum(int(token) in ids for token in encode_sample(processor, turns, None, 4096)["input_ids"])

    reason = why_special(turns, special)
    if reason is None:
        assert count(turns) == count(plain)
    else:
        assert any(token in near and token in reason for token in special)


def write(root: Path, split: str, place: int, token: str) -> Path:
    """The tiny sequence with a token in one text: of the second task's third row."""
    tiny.write_data(root)
    file = root / "Instructions_Original/sides" / f"{split}.json"
    rows = json.loads(file.read_text())
    if split == "test":
        rows[2]["text"] += f" {token} or not"
    else:
        rows[2]["conversations"][place]["value"] += f" {token} or not"
    file.write_text(json.dumps(rows))
    return file


@pytest.mark.parametrize(("split", "place"), [("train", 0), ("train", 1), ("test", 0)])
@pytest.mark.parametrize(
    ("kind", "token"),
    [(kind, token) for kind in ("qwen2_5_vl", "gemma3", "llava_next") for token in KNOWN[kind]],
)
def test_a_row_is_named_by_the_check_and_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, place: int, kind: str, token: str
) -> None:
    file = write(tmp_path, split, place, token)
    report = check_sequence(tmp_path, load_sequence(tmp_path / "sequence.yaml"), processor=processor_of(kind))
    (problem,) = report.problems
    assert (problem.file, problem.row, problem.row_id) == (file, 2, f"sides-{split}-2")
    assert f"turn {place} holds {token}, which the backbone reads as a special token" in problem.reason
    backbone = families.make(kind).save(tmp_path / "backbone")
    monkeypatch.setattr("llava_cmoe.runs.run.load_backbone", lambda *_: pytest.fail("loaded"))
    with pytest.raises(DataError) as error:
        sequence.learn(tiny.recipe(tmp_path / "run", tmp_path, backbone))
    assert error.value.problem == problem


def test_a_row_with_a_token_of_another_backbone_is_fine(tmp_path: Path) -> None:
    write(tmp_path, "train", 1, "<|im_end|>")
    sequence_ = load_sequence(tmp_path / "sequence.yaml")
    assert check_sequence(tmp_path, sequence_, processor=processor_of("llava_next")).ok


def test_a_question_in_the_chat_is_refused_too(tmp_path: Path, learned_session: Callable[[], ChatSession]) -> None:
    session = learned_session()
    for question in ("what is </s>", "<image> and?"):
        with pytest.raises(DataError, match="question: (turn 0 holds </s>|it holds <image>)"):
            session.ask(None, question)


@pytest.fixture
def learned_session(tiny_llava: Any, tiny_processor: Any) -> Callable[[], ChatSession]:
    """A chat with a model that has learned nothing."""
    from llava_cmoe.backbones.loading import Backbone
    from llava_cmoe.chat.opening import LearnedRun
    from llava_cmoe.methods import method_of
    from llava_cmoe.settings.recipes import parse_recipe

    def make() -> ChatSession:
        recipe = parse_recipe({"run": "x", "method": {"name": "zero_shot"}}, source="test")
        method = method_of(recipe.method)(recipe.method, tiny_llava, tiny_processor, 0)
        backbone = Backbone(tiny_llava, tiny_processor, "", "none")
        return ChatSession(LearnedRun(method, backbone, [], ["pad"], None))

    return make


def test_the_marker_of_the_picture_is_no_fault() -> None:
    processor = processor_of("llava_next")
    turns: list[Turn] = [{"role": "user", "text": "<image>\nWhat?"}]
    assert why_special(turns, special_texts(processor)) is None
    assert len(encode_prompt(processor, [{"role": "user", "text": "What?"}], None)["input_ids"])
