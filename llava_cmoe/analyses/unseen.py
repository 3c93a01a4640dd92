"""EvalSet of tasks that a run never learned: are they left to the base model, and is nothing lost?

They are asked twice, located as in use, and of the base model alone; the run's own questions are only located, to count
those that it wrongly turns away. Nothing is written into the run's folder; thresholds are the locator's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table

from llava_cmoe.backbones.loading import reads_images
from llava_cmoe.data.batches import batches
from llava_cmoe.data.coin import read_eval, refuse_pictures
from llava_cmoe.data.paths import files_of
from llava_cmoe.data.task_data import sequence_of
from llava_cmoe.data.tasks import TaskSequence
from llava_cmoe.evaluation.eval_spec import eval_sets_of
from llava_cmoe.evaluation.generate import EvalModel, EvalSet, Route, answer_batch
from llava_cmoe.evaluation.log import Answer, RunFacts
from llava_cmoe.evaluation.scorers import PROTOCOLS, Scorer, get_scorer
from llava_cmoe.evaluation.scoring import score_answers
from llava_cmoe.methods import method_of
from llava_cmoe.provenance.fingerprints import fingerprint_files
from llava_cmoe.report.tables import NOTHING, number
from llava_cmoe.runs.facts import facts_of_run
from llava_cmoe.runs.run import Progress, Run, check_learned, open_learned
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.run import Recipe

BASE = -1
"""The base model among the indices of tasks."""


class UnseenTask(BaseModel):
    """What became of one never-learned task's questions; all but `rows` in percent, the last in percent points."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rows: int
    """EvalSet asked."""
    to_base: float
    """Sent to the base model."""
    to_tasks: dict[str, float]
    """Sent to the experts of a learned task, by that task's name; tasks that got none are absent."""
    located: float
    """Score as in use: each question is answered by whatever it was sent to."""
    base_alone: float
    """Score of the base model on all questions."""
    lost_at_base: float | None
    """Score of the base model alone minus score as in use, on the questions sent to the base model; null if none was.
    They are the same model, so anything but 0 is a mistake in the code."""


class UnseenResults(RunFacts):
    """Everything `llava-cmoe unseen` finds out."""

    learned: tuple[str, ...]
    """Tasks the run had learned."""
    sequence: str
    """Name of the sequence of never-learned tasks."""
    unseen_data: str
    """Fingerprint of its files."""
    protocol: str
    """Scoring rules."""
    protocol_version: int
    """Their version."""
    unseen: dict[str, UnseenTask]
    """Never-learned task to what became of its questions."""
    false_rejections: dict[str, float]
    """Learned task to the percent of its own evaluation prompts that were sent to the base model."""
    false_rejection_rate: float
    """The same over the prompts of all learned tasks."""


def measure_unseen(
    recipe: Recipe, sequence: TaskSequence, root: Path, progress: Progress = lambda *_: None
) -> UnseenResults:
    """Ask a run, as it is after its last learned task, the evaluation questions of tasks that it never learned.

    Args:
        recipe: of the run.
        sequence: the never-learned tasks.
        root: their data root.
        progress: called after every batch.

    Raises:
        RecipeError: the run's method does not locate, or one of the tasks is learned.
        RegistryError: nothing is learned yet, or from other data than there is now.
        DataError: the first problem in the data of either sequence.
    """
    learned = check_unseen(recipe, sequence)
    rows = {task.name: read_eval(root, task) for task in sequence.tasks}
    if not reads_images(recipe.backbone):
        refuse_pictures(root, sequence.tasks)
    run = open_learned(recipe)
    run.method.model.eval()  # type: ignore[no-untyped-call]
    asked = eval_sets_of(replace(run.eval_spec, sequence=sequence, rows=rows), run.backbone.processor, keep=False)
    unseen = {}
    for task in sequence.tasks:
        located, alone = ask_twice(run, asked[task.name], partial(progress, task.name))
        unseen[task.name] = compared(
            located, alone, rows[task.name], get_scorer(task.scorer, recipe.evaluation), learned
        )
    own = eval_sets_of(run.eval_spec, run.backbone.processor, keep=False)
    turned_away = {name: _turned_away(run, own[name], partial(progress, name, "locating")) for name in learned}
    files = [file for task in sequence.tasks for file in files_of(root, task)]
    return UnseenResults(
        **facts_of_run(run).model_dump(),
        learned=learned,
        sequence=sequence.name,
        unseen_data=fingerprint_files(files, root=root),
        protocol=recipe.evaluation.protocol,
        protocol_version=PROTOCOLS[recipe.evaluation.protocol].version,
        unseen=unseen,
        false_rejections={name: _percent(away) for name, away in turned_away.items()},
        false_rejection_rate=_percent([flag for away in turned_away.values() for flag in away]),
    )


def check_unseen(recipe: Recipe, sequence: TaskSequence) -> tuple[str, ...]:
    """The run's learned tasks, once it is clear that there is something to measure; loads no model.

    Raises:
        RecipeError: the run's method does not locate, one of the tasks is learned, or its scorer is not known.
        RegistryError: nothing is learned yet.
    """
    if not method_of(recipe.method).locates:
        raise RecipeError(
            f"{recipe.run}: method {recipe.method.name} does not locate, so it leaves no question to the base model; "
            "give a run of a method that does, such as cmoe"
        )
    learned = sequence_of(recipe.data).names[: check_learned(recipe)]
    for name in sequence.names:
        if name in learned:
            raise RecipeError(f"{recipe.run}: {name} is learned; give a --sequence of tasks that it never learned")
    for task in sequence.tasks:
        get_scorer(task.scorer, recipe.evaluation)
    return learned


def ask_twice(run: Run, questions: EvalSet, at: Callable[[str, int, int], None]) -> tuple[list[Answer], list[Answer]]:
    """Answers as in use (located) and those of the base model alone, in the questions' order and in equal batches."""
    located = Route("located", task_index=BASE, num_known=0, seed=run.recipe.seed)
    alone = replace(located, name="oracle")
    return _ask(run, questions, located, partial(at, "located")), _ask(run, questions, alone, partial(at, "base alone"))


def _ask(run: Run, questions: EvalSet, route: Route, at: Callable[[int, int], None]) -> list[Answer]:
    eval_model = EvalModel(run.method, run.method.model, run.backbone.processor)
    answers: list[Answer] = []
    while len(answers) < len(questions.ids):
        batch = range(len(questions.ids))[len(answers) :][: run.recipe.evaluation.batch_size]
        answers += answer_batch(eval_model, questions, batch, route)
        at(len(answers), len(questions.ids))
    return answers


def compared(
    located: Sequence[Answer], alone: Sequence[Answer], rows: Dataset, scorer: Scorer, learned: Sequence[str]
) -> UnseenTask:
    """Scores are joined with answers by place: both follow the rows."""
    in_use, base = (
        [100 * value for value in score_answers(answers, rows, scorer, source=source).values]
        for answers, source in ((located, "located"), (alone, "base alone"))
    )
    sent = [answer.located for answer in located]
    lost = [whole - used for whole, used, task in zip(base, in_use, sent, strict=True) if task == BASE]
    shares = {name: _percent([one == task for one in sent]) for task, name in enumerate(learned)}
    return UnseenTask(
        rows=len(rows),
        to_base=_percent([one == BASE for one in sent]),
        to_tasks={name: share for name, share in shares.items() if share},
        located=fmean(in_use),
        base_alone=fmean(base),
        lost_at_base=fmean(lost) if lost else None,
    )


def _turned_away(run: Run, questions: EvalSet, at: Callable[[int, int], None]) -> list[bool]:
    """Per prompt of a learned task, whether the locator sends it to the base model; nothing is generated."""
    away: list[bool] = []
    model, batch_size = run.method.model, run.recipe.evaluation.batch_size
    for batch in batches(questions.prompts, run.backbone.processor, batch_size, model.device):
        with torch.no_grad(), run.method.answering(batch) as location:
            model.base_model(**batch, use_cache=False)
        located = location()
        assert located is not None, "a method that locates"
        away += (located.task_B == BASE).tolist()
        at(len(away), len(questions.ids))
    return away


def _percent(flags: Sequence[bool]) -> float:
    return 100 * sum(flags) / len(flags)


def render(results: UnseenResults) -> Table:
    """A row per never-learned task; the false rejections below."""
    title = f"{results.run}: questions of tasks it never learned, in percent"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("task", style="bold", no_wrap=True)
    for heading in (
        "rows",
        "left to the base model",
        "score located",
        "score of the base model",
        "lost where left to it",
    ):
        table.add_column(heading, justify="right")
    table.add_column("taken for")
    for name, task in results.unseen.items():
        numbers = (task.to_base, task.located, task.base_alone, task.lost_at_base)
        table.add_row(name, str(task.rows), *map(number, numbers), _listed(task.to_tasks))
    wrong = {name: share for name, share in results.false_rejections.items() if share}
    table.caption = (
        f"false rejections: {number(results.false_rejection_rate)} of the learned tasks' own questions are left to the "
        f"base model ({_listed(wrong)})"
    )
    table.caption_justify = "left"
    return table


def _listed(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {number(share)}" for name, share in shares.items()) or NOTHING
