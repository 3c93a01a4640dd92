"""What a recipe would learn, computed on its data and its real backbone without a step of training: the dry run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Group
from rich.table import Table

from llava_cmoe.backbones.loading import Backbone, load_backbone, reads_images
from llava_cmoe.data.coin import refuse_pictures
from llava_cmoe.data.encoding import Encoding, PromptRows, SampleRows
from llava_cmoe.data.rows import TRAIN_FEATURES
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.experts import ledger
from llava_cmoe.methods.base import Stage, StageData
from llava_cmoe.records import StageReport
from llava_cmoe.registry.restore import build_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.run import Recipe


@dataclass(frozen=True)
class TaskRows:
    """A task, and how many of its rows would be learned and asked; None where the data root is missing."""

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
        expert_parameters: site name to parameters of one expert there; empty for a method without experts.
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
    """Count rows, load the backbone and grow it for the first stage; nothing is trained and nothing written."""
    data = TaskData.open(recipe.data, recipe.seed)
    sequence, tasks = data.sequence, count_rows(data)
    if recipe.data.root.exists() and not reads_images(recipe.backbone):
        refuse_pictures(recipe.data.root, sequence.tasks)
    backbone = load_backbone(recipe.backbone)
    frozen = backbone.model.num_parameters()  # of weights in 4 bits, one tensor element holds two
    method = build_method(recipe, backbone)
    stages = method.stages(sequence.names)
    if stages[0].learns:
        with suppress(_FirstFit):
            method.learn(_no_rows(stages[0], backbone, recipe), _stop)
    banks = {} if method.host is None else method.host.banks
    return Preview(
        run=recipe.run,
        method=recipe.method.name,
        num_learned=len(Registry(recipe.run).records()),
        tasks=tasks,
        stages=stages,
        frozen_parameters=frozen,
        expert_parameters={site: ledger.expert_parameters(bank) for site, bank in banks.items()},
        trainable_parameters=ledger.trainable(method.model).parameters,
    )


def count_rows(data: TaskData) -> tuple[TaskRows, ...]:
    """The rows of every task that would be learned and asked; None where the data root is missing."""
    if not data.settings.root.exists():
        return tuple(TaskRows(name, None, None) for name in data.sequence.names)
    return tuple(TaskRows(name, len(data.train[name]), len(data.evaluate[name])) for name in data.sequence.names)


def _no_rows(stage: Stage, backbone: Backbone, recipe: Recipe) -> StageData:
    """The first stage without rows: a first task is never probed, so its growth does not depend on them."""
    rows = Dataset.from_dict({name: [] for name in TRAIN_FEATURES}, features=TRAIN_FEATURES)
    return StageData(
        index=0,
        name=stage.name,
        samples=SampleRows(rows, Encoding(backbone.processor), recipe.training.max_length),
        prompts=PromptRows(rows, Encoding(backbone.processor)),
        seed=recipe.seed,
    )


class _FirstFit(Exception):
    """A method is about to train; never leaves this file."""


def _stop(*_: Any, **__: Any) -> StageReport:
    raise _FirstFit


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
