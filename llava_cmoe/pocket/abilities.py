"""What the pocket backbone can do after pretraining, and what it cannot: measured on views and questions it never met.

Each ability is asked in the way it was taught: captions are continued, text-only questions are answered. How it does on
the eight tasks themselves is the evaluation's business (`zero_shot`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from llava_cmoe.data.images import pad_to_square
from llava_cmoe.pocket import captions as captions
from llava_cmoe.pocket import world as world

PADDING = (122, 116, 104)
"""The image processor's mean colour, with which LLaVA pads."""
Box = tuple[float, float, float, float]


def examine(model: PreTrainedModel, processor: Any, num: int = 200) -> dict[str, float]:
    """Percent of `num` fresh cases per ability; the same backbone always gets the same cases.

    Args:
        model: the pocket backbone, in float32.
        processor: its processor.
        num: cases per ability.

    Returns:
        `object`, `sign`, `title`, `author`, `genre`: the caption names it; `box`: the coordinates told of a named
        thing overlap it by at least half (IoU); `spoken`: the answer to a text-only question is right word for word;
        `copied`: the same for exercises in saying again and looking up.
    """
    rng = Random("abilities")
    objects = [world.random_object(rng) for _ in range(num)]
    signs = [world.random_sign(rng) for _ in range(num)]
    books = [world.random_book(rng) for _ in range(num)]
    told_books = _tell(model, processor, books, [""] * num)
    abilities = {
        "object": _share(_tell(model, processor, objects, [""] * num), [view.kind for view in objects]),
        "sign": _share(_tell(model, processor, signs, [""] * num), [f"says {view.word}." for view in signs]),
        "title": _share(told_books, [view.title for view in books]),
        "author": _share(told_books, [view.author for view in books]),
        "genre": _share(told_books, [f"a {view.genre} book" for view in books]),
        "box": _boxes(model, processor, [world.random_scene(rng) for _ in range(num)], rng),
    }
    for name, copying in (("spoken", 0.0), ("copied", 1.0)):
        questions, answers = zip(*(captions.spoken(rng, copying) for _ in range(num)), strict=True)
        abilities[name] = _share(_answer(model, processor, questions), answers, same=True)
    return abilities


def _share(told: Sequence[str], wanted: Sequence[str], same: bool = False) -> float:
    right: Callable[[str, str], bool] = (lambda a, b: a == b) if same else (lambda a, b: b in a)
    return 100 * sum(map(right, told, wanted)) / len(wanted)


def _boxes(model: PreTrainedModel, processor: Any, scenes: Sequence[world.Scene], rng: Random) -> float:
    things = [rng.choice(scene.things) for scene in scenes]
    begun = [f"{captions.opening(scene)} the {thing.name} spans" for scene, thing in zip(scenes, things, strict=True)]
    hits = 0
    for told, scene, thing in zip(_tell(model, processor, scenes, begun), scenes, things, strict=True):
        numbers = [float(number) for number in re.findall(r"[01]\.\d\d", told)[:4]]
        if len(numbers) == 4:
            x0, x1, y0, y1 = numbers
            hits += iou((x0, y0, x1, y1), thing.box(scene.canvas)) >= 0.5
    return 100 * hits / len(scenes)


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = (max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0


def _tell(model: PreTrainedModel, processor: Any, views: Sequence[captions.View], begun: Sequence[str]) -> list[str]:
    """Captions, each continuing what is begun."""
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True
    )
    pictures = [pad_to_square(world.render(view), PADDING) for view in views]
    return _generate(model, processor, [f"{prompt} {start}".rstrip() for start in begun], pictures, 28)


def _answer(model: PreTrainedModel, processor: Any, questions: Sequence[str]) -> list[str]:
    turns = [[{"role": "user", "content": question}] for question in questions]
    prompts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    return _generate(model, processor, prompts, None, 28)


@torch.no_grad()
def _generate(
    model: PreTrainedModel, processor: Any, prompts: Sequence[str], pictures: list[Image.Image] | None, longest: int
) -> list[str]:
    options = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
    images = {} if pictures is None else {"images": pictures}
    batch = processor(text=list(prompts), **images, **options).to(model.device)
    generate: Any = model.generate
    tokens_BT = generate(
        **batch, max_new_tokens=longest, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
    )
    answers = processor.tokenizer.batch_decode(tokens_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
