"""How fast a finished run answers: what locating adds to a prefill, and a mixed batch beside single prompts.

*oracle* is told the task, *located* finds it as the run does. A run that locates inside the prefill (*free*) is also
measured as if it located in a pass of its own before it (*twice*). A prefill is one forward pass over a left-padded
batch of all tasks, as `generate` begins; decoding is the same on every route.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llava_cmoe.analyses.step_costs import Batch, in_turns, now
from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.data.batches import on_device
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.data.encoding import PromptRows
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.methods.base import Method
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.run import Recipe

NEW_TOKENS = 4
"""That each answer has, whatever it says, so that all do the same work."""

Row = dict[str, Tensor]


def measure_run(folder: Path, batch_size: int, turns: int, device: str) -> dict[str, Any]:
    """Medians of seconds and of ratios within a turn, with sizes and machine.

    Raises:
        ValueError: the run's method does not locate before it answers.
    """
    registry = Registry(folder)
    recipe = registry.recipe()
    backbone = load_backbone(recipe.backbone)
    backbone.model.to(device)  # type: ignore[arg-type]
    method = restore_method(recipe, backbone, registry)
    method.model.eval()  # type: ignore[no-untyped-call]
    num_tasks = len(registry.records())
    rows, tasks = questions(recipe, method, num_tasks, batch_size)
    batch, task_B = collated(method, rows), torch.tensor(tasks, device=device)
    located = method.locate(batch)
    if located is None:
        raise ValueError(f"{folder}: its method locates nothing; name a run of one that does")
    settings = getattr(recipe.method, "locator", None)
    free = bool(getattr(settings, "free", False))
    routes: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "oracle": lambda: method.answering(batch, task_B),
        "free" if free else "located": lambda: method.answering(batch),
    }
    if free:
        routes["twice"] = lambda: located_before(method, batch)
    seconds = list(in_turns({name: partial(prefill, method, batch, route) for name, route in routes.items()}, turns))
    first = itertools.cycle(rows)
    answered = list(
        in_turns(
            {
                "batch": lambda: len(rows) / answering_seconds(method, rows),
                "single": lambda: 1 / answering_seconds(method, [next(first)]),
            },
            turns,
        )
    )
    return {
        "run": folder.name,
        "base": backbone.fingerprint,
        "batch": list(batch["input_ids"].shape),
        "tasks": num_tasks,
        "llm_layers": method.model.config.get_text_config().num_hidden_layers,
        "first_layer": getattr(getattr(recipe.method, "experts", None), "first_layer", 0),
        "locator": None if settings is None else settings.model_dump(include={"kind", "feature", "layer"}),
        "located_right": (located.task_B == task_B).float().mean().item(),
        "repetitions": turns,
        "seconds": {name: median(turn[name] for turn in seconds) for name in routes},
        "ratio_to_oracle": {name: median(turn[name] / turn["oracle"] for turn in seconds) for name in routes},
        "answers_a_second": {name: median(turn[name] for turn in answered) for name in ("batch", "single")},
        "batch_to_single": median(turn["batch"] / turn["single"] for turn in answered),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
    }


def questions(recipe: Recipe, method: Method, num_tasks: int, batch_size: int) -> tuple[list[Row], list[int]]:
    """Evaluation prompts of all learned tasks in turn, and the true task of each."""
    data = TaskData.of(recipe)
    specs = data.sequence.tasks[:num_tasks]
    prompts = [PromptRows(data.evaluate[task.name], data.encoding(task, method.processor)) for task in specs]
    tasks = [number % num_tasks for number in range(batch_size)]
    return [prompts[task][number // num_tasks % len(prompts[task])] for number, task in enumerate(tasks)], tasks


def collated(method: Method, rows: list[Row]) -> Batch:
    """One left-padded batch on the model's device."""
    return on_device(Collator(tokenizer_of(method.processor).pad_token_id, "left")(rows), method.model.device)


@contextmanager
def located_before(method: Method, batch: Batch) -> Iterator[None]:
    """Locate in a pass of its own, whatever the run's settings say."""
    located = method.locate(batch)
    assert located is not None and method.host is not None
    with method.host.context.use(RoutePlan.of(located), batch):
        yield


@torch.no_grad()
def prefill(method: Method, batch: Batch, route: Callable[[], AbstractContextManager[object]]) -> float:
    """Seconds of one prefill on a route, the locating of which is part of it."""
    position_ids = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    began = now(method.model.device)
    with route():
        method.model(**batch, position_ids=position_ids, use_cache=True, logits_to_keep=1)
    return now(method.model.device) - began


@torch.no_grad()
def answering_seconds(method: Method, rows: list[Row]) -> float:
    """Seconds to locate and answer some prompts in one batch."""
    batch = collated(method, rows)
    began = now(method.model.device)
    with method.answering(batch):
        method.model.generate(  # type: ignore[operator]
            **batch, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, use_cache=True
        )
    return now(method.model.device) - began
