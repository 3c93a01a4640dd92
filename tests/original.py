"""A LLaVA in its own layout, tiny: an LLM with as many words as vicuna's, a whole CLIP, and a projector file."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY, WIDTH, VISION_WIDTH, SIDE, PATCH = 32_000, 32, 24, 24, 12


def write_parts(folder: Path) -> None:
    """Write `llm`, `vision` and `mm_projector.bin`, in float16, float32 and bfloat16."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, **sizes))
    llm.half().save_pretrained(folder / "llm")
    words = ["<unk>", "<s>", "</s>", *"USER ASSISTANT What is it a cat : ?".split()]
    words += [f"word{index}" for index in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(folder / "llm")
    vision = CLIPVisionConfig(hidden_size=VISION_WIDTH, image_size=SIDE, patch_size=PATCH, **sizes)
    words_of_clip = CLIPTextConfig(hidden_size=16, vocab_size=64, **sizes)
    clip = CLIPModel(CLIPConfig(text_config=words_of_clip.to_dict(), vision_config=vision.to_dict()))
    clip.save_pretrained(folder / "vision")
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder / "vision")
    shapes = {"0.weight": (WIDTH, VISION_WIDTH), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,)}
    projector = {f"model.mm_projector.{name}": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    torch.save(projector, folder / "mm_projector.bin")
