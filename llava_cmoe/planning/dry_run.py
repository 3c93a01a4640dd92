"""What a recipe would learn, from its data and its backbone's config alone: the dry run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table

from llava_cmoe.backbones.loading import reads_images
from llava_cmoe.backbones.meta_model import meta_model
from llava_cmoe.data.coin import refuse_pictures
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.experts import ledger
from llava_cmoe.methods.base import Stage
from llava_cmoe.planning.growth_schedule import expert_sizes, fits_on_paper, on_paper
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.run import Recipe


@dataclass(frozen=True)
class TaskRows:
    """A task, and how many of its rows would be learned and evaluated; None where the data root is missing."""

    name: str
    train: int | None
    evaluate: int | None


@dataclass(frozen=True)
class Preview:
    """What `learn` would do with a recipe.

    Attributes:
        run: output folder.
        method: name of the method.
        num_learned: stages that are learned already and would be restored.
        tasks: the sequence.
        stages: what is learned in one go.
        frozen_parameters: of the backbone.
        expert_parameters: site name to parameters of one expert there; empty for a method without banks.
        trainable_parameters: what the optimizer of the first stage would hold.
    """

    run: Path
    method: str
    num_learned: int
    tasks: tuple[TaskRows, ...]
    stages: tuple[Stage, ...]
    frozen_parameters: int
    expert_parameters: dict[str, int]
    trainable_parameters: int


def preview(recipe: Recipe) -> Preview:
    """Count rows, and grow the method on paper for the first stage; no weight is loaded and nothing written."""
    data = TaskData.of(recipe)
    names, tasks = data.sequence.names, count_rows(data)
    if recipe.data.root.exists() and not reads_images(recipe.backbone):
        refuse_pictures(recipe.data.root, data.sequence.tasks)
    method = on_paper(recipe)
    stages = method.stages(names)
    next(fits_on_paper(method, sum(bool(stage.learns) for stage in stages)), None)
    return Preview(
        run=recipe.run,
        method=recipe.method.name,
        num_learned=len(Registry(recipe.run).records()),
        tasks=tasks,
        stages=stages,
        frozen_parameters=meta_model(recipe.backbone).num_parameters(),
        expert_parameters=expert_sizes(method),
        trainable_parameters=ledger.trainable(method.model).parameters,
    )


def count_rows(data: TaskData) -> tuple[TaskRows, ...]:
    """The rows of every task that would be learned and evaluated; None where the data root is missing."""
    names = data.sequence.names
    if not data.settings.root.exists():
        return tuple(TaskRows(name, None, None) for name in names)
    return tuple(TaskRows(name, len(data.train[name]), len(data.evaluate[name])) for name in names)


def render(found: Preview) -> Group:
    """The preview as two tables: the tasks with their rows, and what is trained."""
    stage_of = {task: stage.name for stage in found.stages for task in stage.learns}
    tasks = Table(title="tasks, in this order")
    for heading in ("task", "learned in stage"):
        tasks.add_column(heading)
    for heading in ("training rows", "evaluation rows"):
        tasks.add_column(heading, justify="right")
    for index, task in enumerate(found.tasks):
        tasks.add_row(task.name, stage_of.get(index, "none"), _number(task.train), _number(task.evaluate))
    facts = Table(title="what would be trained", show_header=False)
    state = f"{found.num_learned} stages are learned, the others would follow" if found.num_learned else "nothing yet"
    facts.add_row("run", str(found.run))
    facts.add_row("learned", state)
    facts.add_row("method", found.method)
    facts.add_row("stages", str(sum(bool(stage.learns) for stage in found.stages)))
    facts.add_row("frozen parameters", _number(found.frozen_parameters))
    if sites := tuple(found.expert_parameters):
        facts.add_row("sites", f"{len(sites)}, from {sites[0]} to {sites[-1]}")
        sizes = sorted(set(found.expert_parameters.values()))
        facts.add_row("parameters per expert and site", " or ".join(map(_number, sizes)))
    facts.add_row("trainable at the first stage", _number(found.trainable_parameters))
    return Group(tasks, facts)


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
