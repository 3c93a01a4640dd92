"""Teach the pocket backbone to see and to read: captions of rendered views, and text-only questions, from a seed.

    python train/pretrain_pocket.py --out runs/pretrain_pocket

A killed run goes on at its last checkpoint; every batch is drawn from (seed, step) alone. Losses then agree to four
digits, not bit for bit (several threads, bf16). The weights that ship were stopped and resumed three times, and the
second phase's cosine was set for 3,400 steps during its first 1,200.
Differs from a textbook loop in one point: a step sums three micro-batches of fixed shapes (scenes, short captions,
text only), because fixed shapes compile once and no time is lost on padding.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration

from llava_cmoe.backbones.loading import Backbone, load_backbone
from llava_cmoe.cli.numbers import whole
from llava_cmoe.data.images import pad_to_square
from llava_cmoe.pocket import captions as captions
from llava_cmoe.pocket import world as world
from llava_cmoe.pocket.abilities import PADDING, examine
from llava_cmoe.pocket.backbone import IMAGE_SIZE, PATCH_SIZE, build_model, build_processor
from llava_cmoe.settings.backbone import BackboneSettings

NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
FLAWS = ("clear", "clear", "clear", "blurred", "dark", "cut", "unreadable")


@dataclass(frozen=True)
class Part:
    """One micro-batch of a step: how many rows of how many tokens."""

    kind: str
    rows: int
    tokens: int


@dataclass(frozen=True)
class Phase:
    """A part of the run with a mix and a cosine schedule of its own.

    `short` is drawn from for short captions, `copying`, `spans` and `opened` are shares that `pocket_captions.py`
    explains, and with `answers_only` the questions among the texts are read and not learned.
    """

    steps: int
    parts: tuple[Part, ...]
    short: tuple[str, ...]
    learning_rate: float
    copying: float
    spans: float = 0.0
    opened: float = 1.0
    answers_only: bool = False


# The first phase alone left a base that sees but does not look anything up in its context (54 % of text-only questions)
# and hardly reads (17 % of signs); hence a second one: half of its text is copying, most of its pictures hold words.
# After it 61 % of signs were read, and a question still did not lead to a place; hence a third: places told in numbers,
# captions that plunge in, and loss on answers alone.
PHASES = (
    Phase(
        steps=4800,
        parts=(Part("scene", 24, 144), Part("short", 24, 84), Part("text", 16, 96)),
        short=("object", "sign", "book"),
        learning_rate=1.2e-3,
        copying=0.0,
    ),
    Phase(
        steps=2800,
        parts=(Part("scene", 20, 144), Part("short", 32, 84), Part("text", 32, 96)),
        short=("object", "sign", "sign", "book", "book"),
        learning_rate=1.2e-3,
        copying=0.5,
    ),
    Phase(
        steps=1400,
        parts=(Part("scene", 24, 144), Part("short", 28, 84), Part("text", 36, 96)),
        short=("object", "sign", "sign", "book"),
        learning_rate=1.0e-3,
        copying=0.2,
        spans=0.3,
        opened=0.5,
        answers_only=True,
    ),
)
DRAW: dict[str, Callable[[Random], captions.View]] = {
    "object": lambda rng: world.random_object(rng, FLAWS),
    "sign": world.random_sign,
    "book": world.random_book,
}


def phase_at(step: int) -> tuple[Phase, int]:
    """The phase a step belongs to, and the step's number within it."""
    for phase in PHASES:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise AssertionError("beyond the last phase")


def square(image: Image.Image) -> np.ndarray:
    """Pad to a centred square and scale, as the data room and the image processor do for a task's pictures."""
    return np.asarray(pad_to_square(image, PADDING).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


class Steps(Dataset[dict[str, Tensor]]):
    """Step i's micro-batches as tensors, a pure function of (seed, i)."""

    def __init__(self, seed: int, first: int, last: int) -> None:
        self.seed, self.first, self.last = seed, first, last
        self.processor = build_processor()

    def __len__(self) -> int:
        """Steps left."""
        return self.last - self.first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """All tensors of one step, keyed `kind.name`."""
        rng, phase = Random(f"{self.seed}/{self.first + index}"), phase_at(self.first + index)[0]
        parts = ((part.kind, self._part(phase, part, rng)) for part in phase.parts)
        return {f"{kind}.{key}": value for kind, tensors in parts for key, value in tensors.items()}

    def _part(self, phase: Phase, part: Part, rng: Random) -> dict[str, Tensor]:
        draw = self._text_row if part.kind == "text" else self._caption_row
        rows = [draw(phase, part, rng) for _ in range(part.rows)]
        ids, learned = (torch.tensor([row[name] for row in rows]) for name in ("ids", "learned"))
        batch = {"ids": ids, "labels": torch.where(learned, ids, -100)}
        if part.kind != "text":
            batch["pixels"] = torch.from_numpy(np.stack([row["pixels"] for row in rows]))
        return batch

    def _caption_row(self, phase: Phase, part: Part, rng: Random) -> dict[str, Any]:
        view = world.random_scene(rng) if part.kind == "scene" else DRAW[rng.choice(phase.short)](rng)
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": captions.caption(view, rng, phase.opened)},
        ]
        prompt = self.processor.apply_chat_template(turns[:1], add_generation_prompt=True)
        answer = self.processor.apply_chat_template(turns)[len(prompt) :]
        head = self._tokens(prompt.replace("<image>", "<image>" * NUM_IMAGE_TOKENS))
        return self._row(part, [(head, False), (self._tokens(answer), True)]) | {"pixels": square(world.render(view))}

    def _text_row(self, phase: Phase, part: Part, rng: Random) -> dict[str, Any]:
        pieces: list[tuple[list[int], bool]] = []
        while sum(len(tokens) for tokens, _ in pieces) < part.tokens:  # conversations are packed; the last is cut off
            question, answer = captions.spoken(rng, phase.copying, phase.spans)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            prompt = self.processor.apply_chat_template(turns[:1], add_generation_prompt=True)
            whole = self.processor.apply_chat_template(turns)
            pieces += [
                (self._tokens(prompt), not phase.answers_only),
                (self._tokens(whole[len(prompt) :]), True),
            ]
        return self._row(part, pieces)

    def _tokens(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False).input_ids)

    def _row(self, part: Part, pieces: list[tuple[list[int], bool]]) -> dict[str, Any]:
        """Pieces of text, each learned or not, as one row of fixed length."""
        ids = [token for tokens, _ in pieces for token in tokens][: part.tokens]
        learned = [told for tokens, told in pieces for _ in tokens][: part.tokens]
        pad = part.tokens - len(ids)
        return {"ids": ids + [self.processor.tokenizer.pad_token_id] * pad, "learned": learned + [False] * pad}


def loss_of(model: LlavaForConditionalGeneration, ids_BT: Tensor, labels_BT: Tensor, pixels: Tensor | None) -> Tensor:
    """Summed next-token loss of one micro-batch, without the data-dependent checks that break a compiled graph."""
    embeds_BTD = model.get_input_embeddings()(ids_BT)
    if pixels is not None:
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        seen = model.model.multi_modal_projector(features).to(embeds_BTD.dtype)
        first = 3  # <s> USER : come before the picture in every caption row
        embeds_BTD = torch.cat([embeds_BTD[:, :first], seen, embeds_BTD[:, first + NUM_IMAGE_TOKENS :]], dim=1)
    start = 0 if pixels is None else first + NUM_IMAGE_TOKENS
    hidden_BTD = model.model.language_model(inputs_embeds=embeds_BTD, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden_BTD[:, start:-1]).float()
    return F.cross_entropy(
        logits.flatten(0, 1), labels_BT[:, start + 1 :].flatten(), ignore_index=-100, reduction="sum"
    )


def save(folder: Path, step: int, model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and optimizer state beside and rename, so that a kill leaves the last checkpoint or this one."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.named_parameters()}, partial / "weights.safetensors")
    moments = {
        f"{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(moments, partial / "optimizer.safetensors")
    (partial / "step.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def resume(folder: Path, model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint in `folder` if there is one; the number of steps already taken."""
    if not folder.exists():
        return 0
    model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)  # tied lm_head has no entry
    state = optimizer.state_dict()
    state["state"] = {}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        index, key = name.split(".")
        state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)
    return int(json.loads((folder / "step.json").read_text())["step"])


def batches(steps: Steps) -> Iterator[dict[str, Tensor]]:
    """Steps in order, prepared by one worker while the previous one is learned."""
    return iter(DataLoader(steps, batch_size=None, num_workers=1, prefetch_factor=4))


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the finished backbone.")] = Path(
        "runs/pretrain_pocket"
    ),
    seed: Annotated[int, whole("--seed", "Seed of weights, pictures and texts.", least=0)] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the step (1.4 times faster; needs a C++ compiler).")
    ] = True,
) -> None:
    """Pretrain the pocket backbone and save it in float16 with its processor."""
    model = build_model(seed)
    for part in (model.model.vision_tower, model.model.language_model):
        part.config._attn_implementation = "eager"  # backward of fused attention is 3 times slower than eager on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    first = resume(out / "checkpoint", model, optimizer)
    mean, std = (
        torch.tensor(getattr(build_processor().image_processor, name)).view(1, 3, 1, 1)
        for name in ("image_mean", "image_std")
    )
    step_loss = torch.compile(loss_of) if compiled else loss_of
    columns = (
        TextColumn("pretraining"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    out.mkdir(parents=True, exist_ok=True)
    log, steps = out / "log.jsonl", sum(phase.steps for phase in PHASES)
    with Progress(*columns) as progress:
        bar, began = progress.add_task("", total=steps, completed=first, losses=""), time.monotonic()
        for step, batch in enumerate(batches(Steps(seed, first, steps)), start=first):
            phase, taken = phase_at(step)
            warm, cosine = min(1.0, (taken + 1) / 200), (1 + math.cos(math.pi * taken / phase.steps)) / 2
            optimizer.param_groups[0]["lr"] = phase.learning_rate * warm * (0.02 + 0.98 * cosine)
            learned = sum(int((batch[f"{part.kind}.labels"] >= 0).sum()) for part in phase.parts)
            losses = {}
            for part in phase.parts:
                pixels = batch.get(f"{part.kind}.pixels")
                if pixels is not None:
                    pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
                labels = batch[f"{part.kind}.labels"]
                with torch.autocast("cpu", torch.bfloat16):
                    loss = step_loss(model, batch[f"{part.kind}.ids"], labels, pixels)
                (loss / learned).backward()  # type: ignore[no-untyped-call]
                losses[part.kind] = loss.item() / int((labels >= 0).sum())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update(bar, advance=1, losses=" ".join(f"{kind} {value:.3f}" for kind, value in losses.items()))
            if step % 25 == 0:
                with log.open("a") as file:
                    file.write(
                        json.dumps({"step": step, "seconds": round(time.monotonic() - began, 1), **losses}) + "\n"
                    )
            if (step + 1) % 250 == 0:
                save(out / "checkpoint", step + 1, model, optimizer)
    finished, processor = out / "weights", build_processor()
    model.half().save_pretrained(finished)  # type: ignore[no-untyped-call]
    processor.save_pretrained(finished)
    report(load_backbone(BackboneSettings(path=str(finished))), out, seed)


def report(backbone: Backbone, out: Path, seed: int) -> None:
    """Write and print what the saved backbone can do, as it will be loaded from its float16 file."""
    abilities = examine(backbone.model, backbone.processor)
    document = {"seed": seed, "base": backbone.fingerprint, "percent_right": abilities}
    (out / "abilities.json").write_text(json.dumps(document, indent=1) + "\n")
    typer.echo(json.dumps(document, indent=1))


if __name__ == "__main__":
    typer.run(main)
