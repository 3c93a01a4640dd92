"""Only answers and their end tokens are learned, and training sees the very tokens that generation starts from."""

import copy
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_cmoe.data.conversation import IGNORED, count_tokens, encode_prompt, encode_sample, to_messages
from llava_cmoe.data.rows import Turn

PICTURE = Image.new("RGB", (24, 24), (10, 200, 30))
NUM_IMAGE_TOKENS = 4

USER_PART = "{% for p in m['content'] %}{{ '<image>\n' if p['type'] == 'image' else p['text'] }}{% endfor %}"
ANSWER = "{{ m['content'][0]['text'] }}"
# The template of llava-1.5 as published: an answer ends with a blank, and nothing says stop.
STOCK_LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}" + USER_PART + "{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + USER_PART + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAILING_BLANK = (
    "{% for m in messages %}{{ bos_token if loop.first }}{% if m['role'] == 'user' %}{{ 'Q: ' }}"
    + USER_PART
    + "{{ ' A: ' }}"
    "{% else %}" + ANSWER + "{{ eos_token }}{% endif %}{% endfor %}"
)
LAST_ONLY = "{{ messages | length }}" + CHATML  # rewrites its beginning with every turn
SHOUTING = CHATML.replace("p['text']", "p['text'] | upper")

TEXTS = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    str.strip
)


@st.composite
def conversations(draw: st.DrawFn, picture: bool) -> list[Turn]:
    """One to four questions with answers; with a picture, the marker stands first or last in the first question."""
    turns: list[Turn] = []
    for question, answer in draw(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)):
        turns += [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    if picture:
        first = turns[0]["text"]
        turns[0]["text"] = draw(st.sampled_from([f"<image>\n{first}", f"{first}\n<image>", f"<image>{first}"]))
    return turns


def with_template(processor: Any, template: str) -> Any:
    other = copy.copy(processor)
    other.chat_template = template
    return other


def learned_texts(processor: Any, sample: dict[str, torch.Tensor]) -> list[str]:
    """The runs of learned tokens, decoded."""
    runs = groupby(sample["labels"].tolist(), key=lambda label: label != IGNORED)
    tokenizer = getattr(processor, "tokenizer", processor)
    return [tokenizer.decode(list(run)) for learned, run in runs if learned]


def answers(turns: list[Turn]) -> list[str]:
    return [turn["text"] for turn in turns if turn["role"] == "assistant"]


@settings(max_examples=60)
@given(data=st.data(), picture=st.booleans())
def test_only_answers_and_their_end_token_are_learned(tiny_processor: Any, data: st.DataObject, picture: bool) -> None:
    turns = data.draw(conversations(picture))
    sample = encode_sample(tiny_processor, turns, PICTURE if picture else None, max_length=2048)
    assert learned_texts(tiny_processor, sample) == [f" {answer}</s>" for answer in answers(turns)]
    learned = sample["labels"] != IGNORED
    assert torch.equal(sample["labels"][learned], sample["input_ids"][learned])


@pytest.mark.parametrize("template", [None, STOCK_LLAVA, CHATML, TRAILING_BLANK])
@settings(max_examples=25)
@given(data=st.data(), picture=st.booleans())
def test_each_prompt_is_a_prefix_of_the_sample(
    tiny_processor: Any, template: str | None, data: st.DataObject, picture: bool
) -> None:
    processor = tiny_processor if template is None else with_template(tiny_processor, template)
    turns, image = data.draw(conversations(picture)), PICTURE if picture else None
    sample = encode_sample(processor, turns, image, max_length=2048)
    starts = [0]
    for end in range(1, len(turns), 2):
        prompt = encode_prompt(processor, turns[:end], image)
        length = len(prompt["input_ids"])
        assert torch.equal(prompt["input_ids"], sample["input_ids"][:length])
        assert sample["labels"][length - 1] == IGNORED and sample["labels"][length] != IGNORED
        starts.append(length)
        assert "labels" not in prompt
    assert starts == sorted(set(starts))


@settings(max_examples=40)
@given(data=st.data(), picture=st.booleans())
def test_no_text_is_lost_and_only_the_picture_grows(tiny_processor: Any, data: st.DataObject, picture: bool) -> None:
    turns = data.draw(conversations(picture))
    sample = encode_sample(tiny_processor, turns, PICTURE if picture else None, max_length=2048)
    text = tiny_processor.tokenizer.decode(sample["input_ids"])
    assert text.count("<image>") == NUM_IMAGE_TOKENS * picture
    rendered = tiny_processor.apply_chat_template(to_messages(turns))
    assert text.replace("<image>" * NUM_IMAGE_TOKENS, "<image>") == f"<s>{rendered}"
    assert torch.equal(sample["attention_mask"], torch.ones_like(sample["input_ids"]))
    assert ("pixel_values" in sample) == picture


@settings(max_examples=30)
@given(data=st.data(), picture=st.booleans())
def test_tokens_are_counted_without_a_picture(tiny_processor: Any, data: st.DataObject, picture: bool) -> None:
    turns = data.draw(conversations(picture))
    sample = encode_sample(tiny_processor, turns, PICTURE if picture else None, max_length=2048)
    assert count_tokens(tiny_processor, turns, image_tokens=NUM_IMAGE_TOKENS - 1) == len(sample["input_ids"])


TWO_TURNS: list[Turn] = [
    {"role": "user", "text": "<image>\nWhat?"},
    {"role": "assistant", "text": "a cat"},
    {"role": "user", "text": "Red?"},
    {"role": "assistant", "text": "no"},
]


@pytest.mark.parametrize(
    ("template", "learned", "whole"),
    [
        (
            STOCK_LLAVA,
            [" a cat</s>", " no</s>"],
            "<s>USER: <image>\nWhat? ASSISTANT: a cat</s>USER: Red? ASSISTANT: no</s>",
        ),
        (
            CHATML,
            ["a cat<|im_end|>", "no<|im_end|>"],
            "<s><|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
            "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>",
        ),
        (TRAILING_BLANK, ["a cat</s>", "no</s>"], "<s>Q: <image>\nWhat? A: a cat</s>Q: Red? A: no</s>"),
    ],
    ids=["stock llava", "chatml", "own bos, trailing blank"],
)
def test_templates_of_other_backbones(tiny_processor: Any, template: str, learned: list[str], whole: str) -> None:
    """An end token where the template has none, no second begin token, nothing learned after the end token."""
    processor = with_template(tiny_processor, template)
    sample = encode_sample(processor, TWO_TURNS, PICTURE, max_length=512)
    assert learned_texts(processor, sample) == learned
    text = tiny_processor.tokenizer.decode(sample["input_ids"])
    assert text.replace("<image>" * NUM_IMAGE_TOKENS, "<image>") == whole


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LAST_ONLY, "rendering turn 1 changes the text of earlier turns"),
        (SHOUTING, "does not render the answer 'a cat'"),
    ],
)
def test_unusable_templates_are_named(tiny_processor: Any, template: str, message: str) -> None:
    processor = with_template(tiny_processor, template)
    with pytest.raises(ValueError, match=f"chat template of LlavaProcessor: {message}"):
        encode_sample(processor, TWO_TURNS, PICTURE, max_length=512)


def test_a_plain_tokenizer_learns_the_same_text_only_sample(tiny_processor: Any) -> None:
    turns: list[Turn] = [{"role": "user", "text": "Red?"}, {"role": "assistant", "text": "no"}, *TWO_TURNS[2:]]
    with_processor = encode_sample(tiny_processor, turns, None, max_length=512)
    with_tokenizer = encode_sample(tiny_processor.tokenizer, turns, None, max_length=512)
    assert with_processor.keys() == with_tokenizer.keys() == {"input_ids", "attention_mask", "labels"}
    assert all(torch.equal(with_processor[key], with_tokenizer[key]) for key in with_processor)


def test_a_blank_prefixing_tokenizer_reads_answers_in_context() -> None:
    """SentencePiece style: a text that stands alone gets a blank in front; an answer must not get a second one."""
    words = ["▁USER:", "▁hi", "▁ASSISTANT:", "▁cat", "▁", "</s>", "<s>", "▁no", "USER:"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="▁"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }}{{ eos_token if m['role'] == 'assistant' "
        "else ' ' }}{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"
    )
    turns: list[Turn] = [{"role": "user", "text": "hi"}, {"role": "assistant", "text": "cat"}]
    sample = encode_sample(tokenizer, turns, None, max_length=64)
    assert tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist()) == [
        "▁USER:",
        "▁hi",
        "▁ASSISTANT:",
        "▁cat",
        "</s>",
    ]
    assert sample["labels"].tolist() == [IGNORED] * 3 + sample["input_ids"].tolist()[3:]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>\nWhat?", ["image", "What?"]),
        ("What?\n<image>", ["What?", "image"]),
        ("<image>What?", ["image", "What?"]),
        ("See <image> here", ["See ", "image", " here"]),
        ("<image>", ["image"]),
        ("\nWhat?\n", ["\nWhat?\n"]),
    ],
)
def test_the_newline_beside_the_marker_goes_with_it(text: str, parts: list[str]) -> None:
    (message,) = to_messages([{"role": "user", "text": text}])
    assert [part.get("text", part["type"]) for part in message["content"]] == parts


def test_a_sample_that_is_too_long_names_its_length(tiny_processor: Any) -> None:
    length = len(encode_sample(tiny_processor, TWO_TURNS, PICTURE, max_length=512)["input_ids"])
    assert encode_sample(tiny_processor, TWO_TURNS, PICTURE, max_length=length)["labels"].shape == (length,)
    with pytest.raises(ValueError, match=f"sample of {length} tokens; at most {length - 1} fit"):
        encode_sample(tiny_processor, TWO_TURNS, PICTURE, max_length=length - 1)


def test_picture_and_marker_belong_together(tiny_processor: Any) -> None:
    with pytest.raises(ValueError, match="belong together"):
        encode_sample(tiny_processor, TWO_TURNS, None, max_length=512)
    with pytest.raises(ValueError, match="belong together"):
        encode_prompt(tiny_processor, [{"role": "user", "text": "What?"}], PICTURE)


def test_samples_end_with_an_answer_and_prompts_with_a_question(tiny_processor: Any) -> None:
    with pytest.raises(ValueError, match="ends with an assistant turn"):
        encode_sample(tiny_processor, TWO_TURNS[:3], PICTURE, max_length=512)
    with pytest.raises(ValueError, match="ends with a user turn"):
        encode_prompt(tiny_processor, TWO_TURNS, PICTURE)
