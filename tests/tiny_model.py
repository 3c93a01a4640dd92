"""A random LLaVA of 77,000 weights and its processor, made offline in stock transformers classes."""

from pathlib import Path

import torch
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


def make_processor() -> LlavaProcessor:
    """24-pixel images as four tokens, about 380 text tokens, a Vicuna-like template."""
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


def make_llava(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Two layers, float32, eval mode; the same weights at every call."""
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


def make_backbone(folder: Path, processor: LlavaProcessor) -> Path:
    """Fill a folder with both, as a recipe's `backbone.path` wants it."""
    make_llava(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
