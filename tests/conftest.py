"""A random LLaVA of 77,000 weights and its processor, made offline in stock transformers classes.

What the shipped pocket backbone can do is tested with the pocket backbone; here only shapes and properties matter.
Everything is tested on the CPU, also where there is a GPU; `test_gpu.py` starts processes that see it.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["GPU_OF_TESTS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gc
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)
gc.freeze()  # what is imported stays; each fit collects garbage twice, and would look through it all

TESTS = Path(__file__).parent

QUICK = {"settings", "provenance", "locators", "experts", "evaluation", "registry", "report"}
"""Rooms whose tests `make quick` runs, beside those of the architecture; the others learn whole runs, start processes
or read all that ships."""
SLOW = {"test_store", "test_runner", "test_results_page", "test_page"}
"""Files of these rooms that do so, too."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow; the file that takes longest begins first, as all wait for it."""
    items.sort(key=lambda item: item.path.stem != "test_engines")
    for item in items:
        quick = item.path.stem == "test_architecture" or bool(QUICK & set(item.path.relative_to(TESTS).parts))
        if not quick or item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


# The same examples every time, and no clock: a busy machine must not fail a property.
settings.register_profile("project", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

IMAGE_SIDE, PATCH = 24, 12  # four image tokens

# Vicuna v1 without its system sentence: "USER: <image>\nquestion ASSISTANT: answer</s>USER: ...".
VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ ' ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ ' ASSISTANT:' if message['role'] == 'user' and (add_generation_prompt or not loop.last) else '' }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
)

CORPUS = (
    "USER: What is the object in the image? ASSISTANT: cat",
    "Answer the question using a single word or phrase. yes no two red blue",
    "Please provide the bounding box coordinate of the region this sentence describes: [0.12, 0.34, 0.56, 0.78]",
    "Answer with the option's letter from the given choices directly. A. B. C. D.",
)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text survives encode and decode, and merges can cross word borders as in real ones."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=VICUNA_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_processor() -> LlavaProcessor:
    """Processor of `tiny_llava`: 24-pixel images as four tokens, about 380 text tokens, a Vicuna-like template."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )


@pytest.fixture
def tiny_llava(tiny_processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Random two-layer LLaVA (float32, eval mode); the same weights for every test, a fresh copy for each."""
    return _llava(tiny_processor)


@pytest.fixture(scope="session")
def tiny_backbone(tiny_processor: LlavaProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `tiny_llava` and its processor, as a recipe's `backbone.path` wants it."""
    folder = tmp_path_factory.mktemp("backbone")
    _llava(tiny_processor).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root of the tiny sequence."""
    root = tmp_path_factory.mktemp("data")
    tiny.write_data(root)
    return root


@pytest.fixture(scope="session")
def lesson_of(
    tiny_data: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tiny.Lesson]:
    """What is seen while a method learns the tiny sequence; each method and its overrides once per session."""

    @cache
    def attend(method: str, *overrides: str) -> tiny.Lesson:
        run = tmp_path_factory.mktemp(method) / "run"
        return tiny.attend(tiny.recipe(run, tiny_data, tiny_backbone, method, *overrides))

    return attend


@pytest.fixture(scope="session")
def sees_gpu() -> dict[str, str]:
    """Environment of a process that is to use the GPU; skips where there is none."""
    seeing = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ["GPU_OF_TESTS"]}
    asking = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if torch.version.cuda is None or subprocess.run(asking, env=seeing).returncode:
        pytest.skip("there is no GPU")
    return seeing


def _llava(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    tokenizer = processor.tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=IMAGE_SIDE, patch_size=PATCH, projection_dim=32),
        text_config=LlamaConfig(
            **sizes,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIDE // PATCH) ** 2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    return model.eval()
