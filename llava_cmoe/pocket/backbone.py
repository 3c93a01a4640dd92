"""The pocket backbone: a LLaVA of about five million parameters in stock transformers classes, part of the package.

Only its shape, its tokenizer and its processor are made here; `train/pretrain_pocket.py` teaches it to see and to read.
The tokenizer knows whole words, and letters where a word is new, because a character-level one triples the length.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from llava_cmoe.pocket import world as world
from llava_cmoe.pocket.captions import plural
from llava_cmoe.pocket.drawings import OBJECTS, SHAPES

POCKET_DIR = Path(__file__).parent / "weights"
IMAGE_SIZE, PATCH_SIZE = 84, 12
SPECIAL_TOKENS = ("<unk>", "<pad>", "<s>", "</s>", "<image>")
WORDS = """
a about above across among an and animal answer are area around as at author background be below big biggest blurred
board book bottom bounding box building but by can cannot category choice choices choose closest clothing color
container coordinate correct cover cut dark describes directly do does dotted down element fact far first following
food for fourth from front front furniture genre given has have how identify image imagine in instrument is it item
its kind left letter letters like list located located long look made many me middle name near no nothing object
objects of off on one option options or out over phrase picture pictured place plain plant please point provide
question read reads region right row same say says scene second see seen sentence shape shapes short show shown shows
side sign single small smallest something spans striped taken tell text that the them there these thing things think
third this title to top type unanswerable under unreadable using vehicle very visible was what where which white who
whose wide with word words would write written wrote yes you your
A Answer Are Based By Can Choose Context Count Find Give How Identify In Is Look Name No Options Please Question Read
Select Tell The There This USER ASSISTANT What Where Which Who Whose Yes
"""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' if loop.last else '<image>\n' }}"
    "{% else %}{{ part['text'] }}{{ '' if loop.last else '\n' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% else %} ASSISTANT: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """All tokens in a fixed order: special ones, symbols, two-decimal numbers, words, letters."""
    names = [
        *world.COLOURS,
        *world.BACKGROUNDS,
        *SHAPES,
        *OBJECTS,
        *world.CATEGORIES,
        *world.GENRES,
        *world.SIGN_WORDS,
    ]
    names += [*world.TITLE_FIRST, *world.TITLE_SECOND, *(author.split()[1] for author in world.AUTHORS)]
    letters = [chr(code) for start in ("a", "A") for code in range(ord(start), ord(start) + 26)]
    symbols = [chr(code) for code in range(33, 127) if not chr(code).isalnum()]
    numbers = [f"{value / 100:.2f}" for value in range(101)]
    tokens = [
        *SPECIAL_TOKENS,
        "\n",
        *symbols,
        *"0123456789",
        *numbers,
        *WORDS.split(),
        *names,
        *map(plural, [*SHAPES, *OBJECTS]),
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    return list(dict.fromkeys(tokens))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words first, letters for what is new; a number with two decimals is one token."""
    order = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(order, unk_token="<unk>", max_input_chars_per_word=40))
    pattern = Regex(r"[01]\.\d\d|[A-Za-z]+|\d|\n|[^\sA-Za-z\d]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    spaces = [
        decoders.Replace(text, text.strip(" "))
        for text in ("[ ", " ]", " ,", " .", " ?", " :", " !", "\n ", " \n", " '")
    ]
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), *spaces])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor; pictures arrive padded to a square and are scaled to `IMAGE_SIZE`."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """The backbone with random weights drawn from `seed`, in float32."""
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=160,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=224,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)
