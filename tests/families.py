"""A tiny random model of every family, with its own processor, all made offline from transformers' classes.

Chat templates say what the published ones say, in fewer words. Vision parts of two layers, 32 wide; pictures of 24
pixels; where a family cuts pictures into crops, up to four and the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CodeGenConfig,
    CodeGenForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    Idefics3VisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
)

from llava_cmoe.backbones.processors import PALIGEMMA, without_videos

SIDE, PATCH = 24, 12
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": SIDE, "patch_size": PATCH}


@dataclass(frozen=True)
class Tiny:
    """A model and what goes with it into its folder."""

    model: PreTrainedModel
    processor: Any

    def save(self, folder: Path) -> Path:
        """The folder as a recipe's `backbone.path` wants it."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return folder


def _template(user: str, image: str, close: str, answer: str, end: str, begin: str = "") -> str:
    """Every message in its wrapping, an image's token where its part stands."""
    parts = (
        "{% for part in m['content'] %}{{ '" + image + "' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    )
    return (
        f"{begin}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user}{parts}{close}{{% else %}}{answer}{parts}"
        f"{end}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )


def _chatml(image: str) -> str:
    return _template("<|im_start|>user\n", image, "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n")


def _tokenizer(template: str | None, *special: str, **named: str) -> PreTrainedTokenizerFast:
    """Letters and bytes; `named` are special tokens that the processor asks the tokenizer for by name."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokens = ["<pad>", "<s>", "</s>", *special, *named.values()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def _text(config: type[PretrainedConfig], tokenizer: PreTrainedTokenizerFast, **more: Any) -> PretrainedConfig:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return config(**SIZES, **ids, num_key_value_heads=2, head_dim=8, vocab_size=len(tokenizer), **more)


def llava_next() -> Tiny:
    template = _template("[INST] ", "<image>\n", " [/INST]", " ", "</s>")
    tokenizer = _tokenizer(template, image_token="<image>")
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=_text(MistralConfig, tokenizer),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    return Tiny(LlavaNextForConditionalGeneration(config), processor)


def llava_onevision() -> Tiny:
    template = _template("<|im_start|>user ", "<image>", "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>")
    tokenizer = _tokenizer(template, "<|im_start|>", "<|im_end|>", image_token="<image>", video_token="<video>")
    processor = without_videos(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=_text(Qwen2Config, tokenizer),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    return Tiny(LlavaOnevisionForConditionalGeneration(config), processor)


def _qwen(kind: Any, config: Any, model: Any, vision: dict[str, Any]) -> Tiny:
    template = _chatml("<|vision_start|><|image_pad|><|vision_end|>")
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(template, *marks)
    pictures = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16**2, "longest_edge": 32**2}
    )
    processor = without_videos(kind)(pictures, tokenizer, chat_template=template)
    text = {**_text(LlamaConfig, tokenizer).to_dict(), "rope_parameters": None}
    text = {key: text[key] for key in (*SIZES, "num_key_value_heads", "vocab_size", "head_dim", "pad_token_id")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), marks[2:], strict=True
        )
    }
    both = config(vision_config={**sizes, "patch_size": 4, **vision}, text_config=text, **ids)
    return Tiny(model(both), processor)


def qwen2_5_vl() -> Tiny:
    vision = {"window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen(Qwen2_5_VLProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision)


def qwen3_vl() -> Tiny:
    vision = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return _qwen(Qwen3VLProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration, vision)


def internvl() -> Tiny:
    template = _chatml("<IMG_CONTEXT>\n")
    tokenizer = _tokenizer(
        template,
        "<|im_start|>",
        "<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = without_videos(InternVLProcessor)(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer,
        image_seq_length=4,
        chat_template=template,
    )
    vision = {**SIZES, "image_size": [SIDE, SIDE], "patch_size": [6, 6]}
    config = InternVLConfig(
        vision_config=vision,
        text_config=_text(Qwen2Config, tokenizer).to_dict(),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return Tiny(InternVLForConditionalGeneration(config), processor)


def _idefics3(config: Any, vision: Any, model: Any) -> Tiny:
    template = _template("User:", "<image>", "<end_of_utterance>\n", "Assistant:", "<end_of_utterance>\n", "<s>")
    template = template.replace("Assistant:{% for", "Assistant: {% for")
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = _tokenizer(
        template, "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}),
        tokenizer,
        image_seq_len=4,
        chat_template=template,
    )
    both = config(
        vision_config=vision(**{**VISION, "patch_size": 6}),
        text_config=_text(LlamaConfig, tokenizer),
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    return Tiny(model(both), processor)


def idefics3() -> Tiny:
    return _idefics3(Idefics3Config, Idefics3VisionConfig, Idefics3ForConditionalGeneration)


def smolvlm() -> Tiny:
    """SmolVLM 2 with the processor of SmolVLM 1: its own wants torchvision and num2words, for videos' time stamps."""
    return _idefics3(SmolVLMConfig, SmolVLMVisionConfig, SmolVLMForConditionalGeneration)


def gemma3() -> Tiny:
    template = _template(
        "<start_of_turn>user\n",
        "<start_of_image>",
        "<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<end_of_turn>\n",
        "{{ bos_token }}",
    )
    tokenizer = _tokenizer(
        template,
        "<start_of_turn>",
        "<end_of_turn>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE), tokenizer, image_seq_length=4, chat_template=template
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**{**VISION, "patch_size": 6}, vision_use_head=False),
        text_config=_text(
            Gemma3TextConfig, tokenizer, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
        ),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros would show nothing
    return Tiny(model, processor)


def paligemma() -> Tiny:
    """PaliGemma 2, whose LLM is Gemma 2; published without a chat template."""
    tokenizer = _tokenizer(PALIGEMMA, image_token="<image>")
    pictures = SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(pictures, tokenizer, chat_template=PALIGEMMA)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, projection_dim=32, vision_use_head=False),
        text_config=_text(Gemma2Config, tokenizer),
        projection_dim=32,
        image_token_index=processor.image_token_id,
    )
    return Tiny(PaliGemmaForConditionalGeneration(config), processor)


TEXT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama() -> Tiny:
    """A language model that reads text alone."""
    tokenizer = _tokenizer(TEXT_TEMPLATE, "<|im_start|>", "<|im_end|>")
    return Tiny(LlamaForCausalLM(_text(LlamaConfig, tokenizer)), tokenizer)


def codegen() -> Tiny:
    """One whose layers have other names than Llama's."""
    tokenizer = _tokenizer(TEXT_TEMPLATE, "<|im_start|>", "<|im_end|>")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "rotary_dim": 8, "n_positions": 512}
    return Tiny(CodeGenForCausalLM(CodeGenConfig(**sizes, **ids, vocab_size=len(tokenizer))), tokenizer)


WITH_IMAGES: dict[str, Callable[[], Tiny]] = {
    make.__name__: make
    for make in (
        llava_next,
        llava_onevision,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        idefics3,
        smolvlm,
        gemma3,
        paligemma,
    )
}
"""By `model_type`; the tests' own LLaVA-1.5 is in `conftest.py`."""


def make(kind: str) -> Tiny:
    """The same weights whenever it is called."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ({**WITH_IMAGES, "llama": llama, "codegen": codegen})[kind]()
    return Tiny(made.model.requires_grad_(False).eval(), made.processor)
