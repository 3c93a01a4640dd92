"""A budget as tables: parameters and disk, memory by part and in all, hours."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group
from rich.table import Table

from llava_cmoe.planning.estimate import Budget, Need

GB = 1e9
NOTHING = "–"


def render(budget: Budget) -> Group:
    """Everything that a budget says."""
    return Group(*_tables(budget))


def _tables(budget: Budget) -> Iterator[Table]:
    yield _parameters(budget)
    yield _parts(budget)
    yield _totals(budget)
    if budget.hours is not None:
        yield _hours(budget)


def _parameters(budget: Budget) -> Table:
    table = Table(title="parameters, and bytes on disk", box=box.SIMPLE_HEAD, show_header=False)
    table.add_row(f"backbone {budget.backbone}", f"{budget.frozen_parameters:,}")
    in_memory = ", ".join(f"{name} {_gb(size)}" for name, size in budget.backbone_bytes.items())
    table.add_row("its weights in memory, by quantization (GB)", in_memory)
    if sites := budget.expert_parameters:
        table.add_row("an expert", " or ".join(f"{size:,}" for size in sorted(set(sites.values()))))
        table.add_row("sites that may hold experts", f"{len(sites)}")
    for course in budget.courses:
        first, last = course.tasks[0], course.tasks[-1]
        label = f"if tasks grow at {course.name}" if course.num_grown is not None else course.name
        if course.num_grown is not None:
            table.add_section()
            table.add_row(f"{label}:", "")
            table.add_row("  routers of the first task, the last one", _pair(first.routers, last.routers))
            table.add_row("  a task's locator", f"{last.locator.parameters:,}")
            table.add_row("  trained for the first task, the last one", _pair(first.trained, last.trained))
            table.add_row("  trained per task, mean", f"{course.mean:,.0f}")
            disk = f"{first.stored.bytes / 1e6:,.1f}, {last.stored.bytes / 1e6:,.1f}"
            table.add_row("  first task, last one on disk (MB)", disk)
        else:
            table.add_row(f"trained, {label}", f"{course.mean:,.0f}")
            table.add_row("a task on disk (MB)", f"{last.stored.bytes / 1e6:,.1f}")
    return table


def _parts(budget: Budget) -> Table:
    title = f"memory of one GPU by part (GB); activations of so many samples of {budget.length} tokens"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("stage", "spread by"):
        table.add_column(heading, no_wrap=True)
    headings = (
        "GPUs",
        "samples",
        "backbone",
        "old experts",
        "trained",
        "gradients",
        "optimizer",
        "gathered",
        "activations",
    )
    for heading in (*headings, "checkpointed", "on the host"):
        table.add_column(heading, justify="right")
    for need in _ordered(budget):
        memory = need.memory
        sizes = (memory.pool, memory.trained, memory.gradients, memory.optimizer, memory.gathered)
        kept = (need.activations.kept, need.activations.checkpointed, memory.host)
        cells = map(_gb, (memory.backbone["none"], *sizes, *kept))
        counts = str(need.num_gpus), str(need.batch_size)
        table.add_row(need.stage, need.strategy, *counts, *cells, end_section=_ends(budget, need))
    return table


def _totals(budget: Budget) -> Table:
    table = Table(title="memory of one GPU in all (GB), by quantization; ckpt: with gradient checkpointing")
    table.box = box.SIMPLE_HEAD
    for heading in ("stage", "spread by"):
        table.add_column(heading, no_wrap=True)
    table.add_column("GPUs", justify="right")
    for name in budget.backbone_bytes:
        table.add_column(name, justify="right")
        table.add_column(f"{name}, ckpt", justify="right")
    for need in _ordered(budget):
        cells = []
        for name in budget.backbone_bytes:
            states = need.memory.states(name)
            for kept in (need.activations.kept, need.activations.checkpointed):
                cells.append(_gb(None if states is None else states + kept))
        table.add_row(need.stage, need.strategy, str(need.num_gpus), *cells, end_section=_ends(budget, need))
    table.caption = (
        "On top: what an operation needs while it runs (some copies of the logits), CUDA's context, fragmentation and "
        "ZeRO's buckets. ZeRO-3 does not split quantized weights, and DeepSpeed holds no experts in bfloat16."
    )
    table.caption_justify = "left"
    return table


def _hours(budget: Budget) -> Table:
    table = Table(title="time", box=box.SIMPLE_HEAD, show_header=False)
    table.add_row("samples learned from, probing among them", f"{budget.samples:,}")
    table.add_row("hours, without evaluation and fitting locators", f"{budget.hours:,.1f}")
    return table


def _ordered(budget: Budget) -> list[Need]:
    """By stage, then by the number of GPUs."""
    stages = list(dict.fromkeys(need.stage for need in budget.needs))
    return sorted(budget.needs, key=lambda need: (stages.index(need.stage), need.num_gpus))


def _ends(budget: Budget, need: Need) -> bool:
    """Whether it is the last one of its stage and number of GPUs."""
    return need.strategy == budget.needs[-1].strategy


def _pair(first: object, last: object) -> str:
    return f"{first.parameters:,}, {last.parameters:,}"  # type: ignore[attr-defined]


def _gb(size: int | None) -> str:
    return NOTHING if size is None else f"{size / GB:,.2f}"
