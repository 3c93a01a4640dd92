"""What a run is asked after every task, and where its answers go."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from llava_cmoe.data.encoding import Encoding, PromptRows
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.data.tasks import TaskSequence
from llava_cmoe.data.validation import SEED
from llava_cmoe.evaluation.generate import EvalSet, RouteName
from llava_cmoe.evaluation.log import Subset
from llava_cmoe.evaluation.scorers import get_scorer
from llava_cmoe.evaluation.subset import STRATA, UNSTRATIFIED, stratified
from llava_cmoe.settings.evaluation import EvaluationSettings


@dataclass(frozen=True)
class EvalSpec:
    """What a run is asked, the same after every task.

    Attributes:
        sequence: the tasks in order.
        rows: task name to its canonical evaluation rows.
        folder: where the answers files go: `after_03/TextVQA.located.jsonl` (3: after the third task).
        settings: routes and batch size.
        seed: of the random route.
        max_pixels: largest picture that the backbone's processor is given; any when None.
        subset: which part of the questions the rows are; None if all.
    """

    sequence: TaskSequence
    rows: Mapping[str, Dataset]
    folder: Path
    settings: EvaluationSettings
    seed: int
    max_pixels: int | None = None
    subset: Subset | None = None

    def __post_init__(self) -> None:
        """Raises for a misspelt scorer, or one that lacks something, before anything is learned."""
        for task in self.sequence.tasks:
            get_scorer(task.scorer, self.settings)

    def answers_folder(self, after: int) -> Path:
        """Folder of one row of the matrix; `after` counts from 0."""
        return self.folder / f"after_{after + 1:02d}"

    def answers_path(self, after: int, task: int, route: RouteName) -> Path:
        """Answers file of one cell; `after` and `task` count from 0."""
        return self.answers_folder(after) / f"{self.sequence.names[task]}.{route}.jsonl"


def eval_spec_of(data: TaskData, evaluation: EvaluationSettings, folder: Path) -> EvalSpec:
    """What a run is asked, its answers in `folder`; reads and checks the evaluation rows, needs no model."""
    limit, seed = evaluation.limit, evaluation.subset_seed
    rows = {name: stratified(found, limit, seed) for name, found in data.evaluate.items()}
    return EvalSpec(
        data.sequence,
        rows,
        folder / "answers",
        evaluation,
        data.seed,
        data.settings.max_pixels,
        subset_of(data, evaluation),
    )


def subset_of(data: TaskData, evaluation: EvaluationSettings) -> Subset | None:
    """Which part of the questions is evaluated; None if all of the test split are."""
    of, drawn = data.num_evaluate, data.settings.eval_rows
    if evaluation.limit is not None:
        return Subset(limit=evaluation.limit, seed=evaluation.subset_seed, strata=STRATA, of=of, split=data.split)
    if drawn is not None and any(num > drawn for num in of.values()):
        own = data.settings.eval_seed
        seed = data.seed if own is None else own
        return Subset(limit=drawn, seed=seed, strata=UNSTRATIFIED, of=of, by="data.eval_rows", split=data.split)
    if data.split == "validation":
        most = max(of.values())
        return Subset(limit=most, seed=SEED, strata=UNSTRATIFIED, of=of, by="evaluation.split", split=data.split)
    return None


def eval_sets_of(eval_spec: EvalSpec, processor: Any, keep: bool = True) -> dict[str, EvalSet]:
    """The questions by task name, to be made once per run; a prompt is encoded when it is first answered.

    It is then kept, because every later row of the matrix asks it again; `keep=False` gives up that time where all
    pictures do not fit into memory (1.4 MB each at 336 pixels).
    """
    return {
        task.name: EvalSet(
            ids=tuple(eval_spec.rows[task.name]["id"]),
            texts=tuple(turns[0]["text"] for turns in eval_spec.rows[task.name]["turns"]),
            prompts=PromptRows(
                eval_spec.rows[task.name], Encoding(processor, task.geometry, eval_spec.max_pixels, keep)
            ),
            max_new_tokens=task.max_new_tokens,
        )
        for task in eval_spec.sequence.tasks
    }


def discard_answers(eval_spec: EvalSpec, after: int) -> None:
    """Remove the answers of row `after` and below, subsets' too: whoever learns that task anew makes another model."""
    for folder in (eval_spec.folder, *eval_spec.folder.parent.glob(f"subsets/*/{eval_spec.folder.name}")):
        for row in range(after, len(eval_spec.sequence.names)):
            shutil.rmtree(replace(eval_spec, folder=folder).answers_folder(row), ignore_errors=True)


def answered(eval_spec: EvalSpec, after: int) -> bool:
    """Whether every question of one row of the matrix is answered."""
    return all(
        eval_spec.answers_path(after, task, route).exists()
        for task in range(after + 1)
        for route in eval_spec.settings.routes
    )


def complete(eval_spec: EvalSpec, after: int) -> list[tuple[int, RouteName]]:
    """Task and route of every complete answers file of one row of the matrix."""
    return [
        (task, route)
        for route in eval_spec.settings.routes
        for task in range(
            len(eval_spec.sequence.names)
        )  # answers of a task not learned yet may have been brought along
        if eval_spec.answers_path(after, task, route).exists()
    ]
