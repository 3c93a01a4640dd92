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
    """Everything that a budget holds."""
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
    for schedule in budget.growth_schedules:
        first, last = schedule.tasks[0], schedule.tasks[-1]
        if schedule.num_grown is None:
            table.add_row(f"trained, {schedule.name}", f"{schedule.mean:,.0f}")
            table.add_row("a task on disk (MB)", _mb(last.stored.bytes))
            continue
        table.add_section()
        table.add_row(f"if tasks grow at {schedule.name}:", "")
        trained = f"{first.trained.parameters:,}, {last.trained.parameters:,}"
        table.add_row("  trained for the first task, the last one", trained)
        table.add_row("  trained per task, mean", f"{schedule.mean:,.0f}")
        if last.also_stored.parameters:
            table.add_row("  a task also stores, such as a locator", f"{last.also_stored.parameters:,}")
        table.add_row("  first task, last one on disk (MB)", f"{_mb(first.stored.bytes)}, {_mb(last.stored.bytes)}")
    return table


def _parts(budget: Budget) -> Table:
    title = f"memory of one GPU by part (GB); activations of so many samples of {budget.length} tokens"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("training", "spread by"):
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
        table.add_row(need.fit, need.strategy, *counts, *cells, end_section=_ends(budget, need))
    return table


def _totals(budget: Budget) -> Table:
    table = Table(title="memory of one GPU in all (GB), by quantization; ckpt: with gradient checkpointing")
    table.box = box.SIMPLE_HEAD
    for heading in ("training", "spread by"):
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
        table.add_row(need.fit, need.strategy, str(need.num_gpus), *cells, end_section=_ends(budget, need))
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
    """By fit, then by the number of GPUs."""
    fits = list(dict.fromkeys(need.fit for need in budget.needs))
    return sorted(budget.needs, key=lambda need: (fits.index(need.fit), need.num_gpus))


def _ends(budget: Budget, need: Need) -> bool:
    """Whether it is the last one of its fit and number of GPUs."""
    return need.strategy == budget.needs[-1].strategy


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _gb(size: int | None) -> str:
    return NOTHING if size is None else f"{size / GB:,.2f}"
