"""How fast it is: experts beside plain LoRA, cost against the number of tasks, what locating adds to a finished run.

    python eval/speed.py steps --model small                       # ratios and their bars
    python eval/speed.py tasks --model small                       # a decoding step after 1 to 300 tasks
    python eval/speed.py run runs/pocket_cmoe                      # locating, and batches beside single prompts
    python eval/speed.py steps --model llava-1.5-7b --device cuda --checkpointing --variants lora_16,cmoe_8

Everything that is compared takes turns in one process, so that whatever else the machine does meets all alike; figures
are medians over the turns, ratios medians of the ratios within a turn. `steps` and `tasks` read made-up rows, on a
model of random weights where no checkpoint is named (`llava_cmoe/analyses/step_costs.py`).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from llava_cmoe.analyses.answering_speed import measure_run
from llava_cmoe.analyses.speed_variants import BARS, STEPS, cmoe_tasks
from llava_cmoe.analyses.step_costs import Load, config_of, made_up_batch, measure, random_model, ratio
from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.cli.numbers import whole
from llava_cmoe.provenance.versions import versions
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.report.figures import draw_tasks
from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.recipes import parse_settings

CUDA = torch.cuda.is_available()
NUM_TASKS = (1, 8, 32, 100, 300)

app = typer.Typer(help=__doc__, rich_markup_mode=None, no_args_is_help=True)

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Model = Annotated[str, typer.Option(help="pocket, small, llava-1.5-7b, or a model's folder.")]
Turns = Annotated[int, whole("--turns", "That are measured, after two that are not.", least=2, most=10_000)]
Rows = Annotated[int, whole("--batch-size", "Rows of a batch.", least=1, most=4096)]
Tokens = Annotated[int, whole("--tokens", "Of a made-up row, without its picture's.", least=1, most=100_000)]
Weights = Annotated[str, typer.Option(help="random, or of the folder: none (as they are), 8bit or nf4.")]
Dtype = Annotated[str, typer.Option(help="Of the frozen weights.")]
Attention = Annotated[str, typer.Option(help="sdpa, eager or flash_attention_2.")]


@app.command()
def steps(
    model: Model = "small",
    device: Device = "cuda" if CUDA else "cpu",
    batch_size: Rows = 2,
    tokens: Tokens = 48,
    turns: Turns = 10,
    variants: Annotated[str, typer.Option(help="Of them, with commas; all where absent.")] = ",".join(STEPS),
    weights: Weights = "random",
    dtype: Dtype = "bfloat16" if CUDA else "float32",
    attention: Attention = "sdpa",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute layers again in backward.")] = False,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("eval/results/speed_steps.json"),
) -> None:
    """A training step, a prefill and a decoding step of each variant, and the ratios that have a bar."""
    names = variants.split(",")
    if strange := sorted(set(names) - STEPS.keys()):
        raise typer.BadParameter(f"--variants: {', '.join(strange)}; there are {', '.join(STEPS)}")
    stock, base = _model(model, device, weights, dtype, attention)
    load = Load(batch_size, tokens, turns, checkpointing)
    batch = made_up_batch(stock.config, load, stock.device)
    costs, seconds = measure({name: STEPS[name](stock) for name in names}, batch, load)
    bars = {
        name: {**ratio(seconds, one, other, part), "at_most": most}
        for name, (one, other, part, most) in BARS.items()
        if {one, other} <= set(names)
    }
    _write(out, base, load, batch, {"costs": {name: asdict(one) for name, one in costs.items()}, "ratios": bars})
    for name, found in bars.items():
        typer.echo(f"{name}: {found['median']:.2f} (at most {found['at_most']:.2f})")


@app.command()
def tasks(
    model: Model = "small",
    device: Device = "cuda" if CUDA else "cpu",
    batch_size: Rows = 16,
    tokens: Tokens = 20,
    turns: Turns = 10,
    weights: Weights = "random",
    dtype: Dtype = "bfloat16" if CUDA else "float32",
    attention: Attention = "sdpa",
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("eval/results/speed_tasks.json"),
) -> None:
    """A prefill and a decoding step of a batch of all tasks, after 1 to 300 tasks, each of which grew everywhere."""
    stock, base = _model(model, device, weights, dtype, attention)
    load = Load(batch_size, tokens, turns)
    batch = made_up_batch(stock.config, load, stock.device)
    variants = {str(num): cmoe_tasks(stock, num, batch_size) for num in NUM_TASKS}
    costs, seconds = measure(variants, batch, load, learns=False)
    to_one = {name: {part: ratio(seconds, name, "1", part) for part in ("prefill", "decoding")} for name in variants}
    _write(out, base, load, batch, {"costs": {name: asdict(one) for name, one in costs.items()}, "to_one_task": to_one})
    draw_tasks({name: asdict(one) for name, one in costs.items()}, out.with_suffix(".png"))
    for name, found in to_one.items():
        typer.echo(
            f"{name} tasks: decoding {found['decoding']['median']:.2f}, prefill {found['prefill']['median']:.2f}"
        )


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Finished run of a method that locates.")],
    device: Device = "cuda" if CUDA else "cpu",
    batch_size: Rows = 32,
    turns: Turns = 10,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("eval/results/speed_locating.json"),
) -> None:
    """What locating adds to a prefill, and answers a second of a batch beside those of single prompts."""
    try:
        found = measure_run(folder, batch_size, turns, device)
    except (OSError, ValueError, RegistryError) as error:
        raise typer.BadParameter(str(error)) from error
    _save(out, found | {"versions": versions()})
    for name, one in found["ratio_to_oracle"].items():
        typer.echo(f"{name} / oracle, prefill: {one:.3f}")
    typer.echo(f"a batch of {batch_size} / single prompts, answers a second: {found['batch_to_single']:.1f}")


def _model(model: str, device: str, weights: str, dtype: str, attention: str) -> tuple[Any, dict[str, Any]]:
    """The frozen model, and what it is."""
    try:
        if device == "cuda" and not CUDA:
            raise ValueError("--device cuda: torch sees no GPU; leave the option out")
        told = {"dtype": dtype, "attention": attention}
        if weights == "random":
            settings = parse_settings(BackboneSettings, told, source="eval/speed.py")
            stock, fingerprint = random_model(config_of(model), settings, device), "random"
        else:
            told |= {"quantization": weights, "path": model}
            loaded = load_backbone(parse_settings(BackboneSettings, told, source="eval/speed.py"))
            stock, fingerprint = loaded.model.to(device), loaded.fingerprint  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    base = {"model": model, "weights": fingerprint, "parameters": stock.num_parameters()} | told
    return stock, base | {"device": torch.cuda.get_device_name() if device == "cuda" else device}


def _write(out: Path, base: dict[str, Any], load: Load, batch: dict[str, torch.Tensor], found: dict[str, Any]) -> None:
    """With what was measured, and on what."""
    read = asdict(load) | {"row_tokens": batch["input_ids"].shape[1]}
    _save(out, base | {"load": read, "threads": torch.get_num_threads()} | found | {"versions": versions()})


def _save(out: Path, found: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app()
