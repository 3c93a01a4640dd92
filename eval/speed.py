"""How fast it is: what locating costs on a finished run, or what experts cost beside plain LoRA on a model's shape.

    python eval/speed.py runs/pocket_cmoe_free --repetitions 30 --out eval/results/speed.json
    python eval/speed.py --device cuda --model llava-1.5-7b --random-weights --checkpointing

Of a run that locates in passing: seconds of the prefill on three routes.
*oracle* is told the task, *free* locates inside the prefill, *twice* locates in a forward pass of its own before it (up
to the locator's layer). One process measures all three in turn, the first of each turn changing, so that whatever else
the machine does meets all alike. A prefill is one forward pass over a left-padded batch of all tasks, as `generate`
begins; decoding is the same on every route.

Without a run: tokens a second and memory of learning and reading made-up rows (`llava_cmoe/analyses/throughput.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from llava_cmoe.analyses.throughput import Workload, measure_training
from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.cli.numbers import whole
from llava_cmoe.data.batches import on_device
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.data.encoding import PromptRows
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.provenance.versions import versions
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.recipes import parse_settings
from llava_cmoe.settings.run import Recipe
from llava_cmoe.settings.training import TrainingSettings
from llava_cmoe.settings.values import SIZES

Batch = dict[str, Tensor]
Answering = Callable[[], AbstractContextManager[object]]


CUDA = torch.cuda.is_available()


def main(
    run: Annotated[
        Path | None, typer.Argument(help="Finished run with method.locator.free; experts are measured without.")
    ] = None,
    batch_size: Annotated[int, whole("--batch-size", "Rows of a batch.", least=1, most=65_536)] = 32,
    repetitions: Annotated[
        int, whole("--repetitions", "Turns that are measured, after two that are not.", least=1, most=100_000)
    ] = 30,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if CUDA else "cpu",
    model: Annotated[str, typer.Option(help="Without a run: pocket, llava-1.5-7b, or a model's folder.")] = "pocket",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build the model from its configuration, without a checkpoint.")
    ] = False,
    tokens: Annotated[
        int, whole("--tokens", "Of a made-up row, without its picture's.", least=1, most=SIZES["max_length"])
    ] = 64,
    experts: Annotated[
        int, whole("--experts", "Per site, one of which learns.", least=1, most=SIZES["num_experts"])
    ] = 8,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights.")] = "bfloat16" if CUDA else "float32",
    attention: Annotated[str, typer.Option(help="sdpa, eager or flash_attention_2.")] = "sdpa",
    quantization: Annotated[str, typer.Option(help="none, 8bit or nf4 of a checkpoint's weights.")] = "none",
    optimizer: Annotated[str, typer.Option(help="As training.optimizer.")] = "adamw",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="As training.gradient_checkpointing.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON to write; of a run, eval/results/speed.json.")] = None,
) -> None:
    """Measure, and write medians, ratios, and what they were measured with."""
    try:
        if device == "cuda" and not CUDA:
            raise ValueError("--device cuda: torch sees no GPU; leave the option out")
        if run is not None:
            found = measure(run, batch_size, repetitions, device)
            out, ratios = out or Path("eval/results/speed.json"), found["ratio_to_oracle"]
        else:
            kinds = {"dtype": dtype, "attention": attention, "quantization": quantization}
            precision = "float32" if dtype == "float32" else "bf16"
            learning = {"optimizer": optimizer, "gradient_checkpointing": checkpointing, "precision": precision}
            found = measure_training(
                model,
                random_weights,
                device,
                Workload(batch_size, tokens, experts, repetitions),
                parse_settings(BackboneSettings, kinds, source="eval/speed.py"),
                parse_settings(TrainingSettings, learning, source="eval/speed.py"),
            )
            ratios = found["cmoe_to_lora"]
            for name, pace in found["paces"].items():
                memory = "" if pace["peak_bytes"] is None else f", {pace['peak_bytes'] / 2**30:.1f} GiB"
                typer.echo(f"{name}: {pace['learning']:.0f} tokens/s learning{memory}, {pace['reading']:.0f} reading")
    except (OSError, ValueError, RegistryError) as error:
        raise typer.BadParameter(str(error)) from error
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    typer.echo("  ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))


def measure(run: Path, batch_size: int, repetitions: int, device: str) -> dict[str, Any]:
    """Medians of seconds and of ratios within a turn, with sizes, machine and versions."""
    registry = Registry(run)
    recipe = registry.recipe()
    backbone = load_backbone(recipe.backbone)
    backbone.model.to(device)  # type: ignore[arg-type]
    method = restore_method(recipe, backbone, registry)
    if not (isinstance(method, Cmoe) and method.settings.locator.free):
        raise ValueError(f"{run}: method.locator.free is off; learn a run such as train/recipes/pocket_cmoe_free.yaml")
    method.model.eval()  # type: ignore[no-untyped-call]
    batch, task_B = questions(recipe, method, len(registry.records()), batch_size)
    routes: dict[str, Answering] = {
        "oracle": lambda: method.answering(batch, task_B),
        "free": lambda: method.answering(batch),
        "twice": lambda: located_before(method, batch),
    }
    right_B = method.locating.locate(batch).task_B == task_B
    turns = list(turns_of(method, batch, routes, repetitions))
    experts = method.settings.experts
    return {
        "run": run.name,
        "base": backbone.fingerprint,
        "batch": list(batch["input_ids"].shape),
        "tasks": len(registry.records()),
        "llm_layers": method.model.config.get_text_config().num_hidden_layers,
        "first_layer": experts.first_layer,
        "locator": method.settings.locator.model_dump(include={"kind", "feature", "layer"}),
        "experts": {site: bank.num_experts for site, bank in method.host.banks.items()},
        "located_right": right_B.float().mean().item(),
        "repetitions": repetitions,
        "seconds": {name: median(turn[name] for turn in turns) for name in routes},
        "ratio_to_oracle": {name: median(turn[name] / turn["oracle"] for turn in turns) for name in routes},
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def questions(recipe: Recipe, method: Cmoe, num_tasks: int, batch_size: int) -> tuple[Batch, Tensor]:
    """One left-padded batch of evaluation prompts, from all learned tasks in turn, and the true task of each."""
    data = TaskData.of(recipe)
    specs = data.sequence.tasks[:num_tasks]
    prompts = [PromptRows(data.evaluate[task.name], data.encoding(task, method.processor)) for task in specs]
    tasks = [number % num_tasks for number in range(batch_size)]
    rows = [prompts[task][number // num_tasks % len(prompts[task])] for number, task in enumerate(tasks)]
    batch = Collator(tokenizer_of(method.processor).pad_token_id, "left")(rows)
    device = method.model.device
    return on_device(batch, device), torch.tensor(tasks, device=device)


@contextmanager
def located_before(method: Cmoe, batch: Batch) -> Iterator[None]:
    """Locate in a pass of its own, whatever the run's settings say."""
    plan = RoutePlan.of(method.locating.locate(batch))
    with method.host.context.use(plan, batch):
        yield


@torch.no_grad()
def turns_of(method: Cmoe, batch: Batch, routes: dict[str, Answering], repetitions: int) -> Iterator[dict[str, float]]:
    """Seconds of one prefill per route, turn by turn; two turns warm up."""
    position_ids = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    names = list(routes)
    for turn in range(-2, repetitions):
        seconds = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = now()
            with routes[name]():
                method.model(**batch, position_ids=position_ids, use_cache=True, logits_to_keep=1)
            seconds[name] = now() - begin
        if turn >= 0:
            yield seconds


def now() -> float:
    """Seconds, once the device has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
