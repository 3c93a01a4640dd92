"""Merging a finished run: as many experts left out as every task bears, checked on rows that it never learned.

The pool of experts grows with every task; some are little used, some compute what another one computes. Those are left
out in the order of what that changes (`redundancy.py`), as many as keep every task's held-out loss within a
bound. Learning goes on from the run as it was: a merge is an entry beside it, for answering (`store.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from llava_cmoe.data.batches import batches
from llava_cmoe.data.conversation import IGNORED
from llava_cmoe.data.encoding import SampleRows
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.evaluation.eval_spec import EvalSpec, eval_sets_of
from llava_cmoe.evaluation.generate import EvalModel
from llava_cmoe.evaluation.log import check_answers
from llava_cmoe.evaluation.runner import evaluate_after
from llava_cmoe.evaluation.scoring import score_after
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.merging.merged_bank import merge, unmerge
from llava_cmoe.merging.redundancy import Redundancy, Step, merge_map_of
from llava_cmoe.merging.store import BeforeAfter, MergeRecord, Merges
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.provenance.versions import versions
from llava_cmoe.runs.run import Progress, Run, check_learned, open_learned
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.cmoe import CmoeSettings
from llava_cmoe.settings.run import Recipe

BATCH = 32
"""Samples per forward pass while losses are measured."""
PATIENCE = 4
"""So many experts in a row that a task cannot do without end the search for more."""


@dataclass(frozen=True)
class Subject:
    """A run whose learned tasks are back in the model, and rows of each that it never learned."""

    run: Run
    method: Cmoe
    held_out: Mapping[str, SampleRows]


def merge_run(
    recipe: Recipe, bound: float, num_rows: int, progress: Progress = lambda *_: None
) -> tuple[MergeRecord, Path]:
    """Find a large merge that all tasks bear, measure it on the evaluation rows and write it down; says where.

    Args:
        recipe: of the run.
        bound: the most by which a task's held-out loss may rise, in nats per answer token.
        num_rows: held-out rows per task, at most.
        progress: called with what is being measured.

    Raises:
        RecipeError: the run's method has no experts, or it learned all training rows, so that none is held out.
        RegistryError: no task is learned.
    """
    check_answers(recipe.run)  # those of the run are not asked again
    subject = open_subject(recipe, num_rows)
    host, registry, merges = subject.method.host, subject.run.registry, Merges(subject.run.registry)
    redundancy = Redundancy(host)
    with redundancy.watch():
        before = losses(subject, partial(progress, "use and likeness"))
    steps = tuple(redundancy.steps())
    steps, after = largest_feasible(subject, steps, before, bound, progress)
    accuracy_before = accuracies(subject, subject.run.eval_spec.folder, progress)
    bytes_before, merge = expert_bytes(subject), merge_map_of(steps, host)
    with merged(subject, steps):
        accuracy_after = accuracies(subject, merges.prepare() / "answers", progress)
        bytes_after = expert_bytes(subject)
    record = MergeRecord(
        parent=registry.records()[-1].sha256,
        bound=bound,
        stand_ins={site: stand_ins.of_E for site, stand_ins in merge.items()},
        shares={site: stand_ins.share_E for site, stand_ins in merge.items()},
        held_out={name: len(rows) for name, rows in subject.held_out.items()},
        loss=_pairs(before, after),
        accuracy=_pairs(accuracy_before, accuracy_after),
        expert_bytes=BeforeAfter(before=bytes_before, after=bytes_after),
        versions=versions(),
    )
    return merges.commit(record)


def open_subject(recipe: Recipe, num_rows: int) -> Subject:
    """Bring a run's learned tasks back, and read rows of theirs that were not learned."""
    if not isinstance(recipe.method, CmoeSettings):
        raise RecipeError(f"{recipe.run}: method {recipe.method.name} has no pool of experts to merge; cmoe has")
    num_learned, data = check_learned(recipe), TaskData.of(recipe)
    tasks = data.sequence.tasks[:num_learned]
    rows = {task.name: data.held_out(task.name) for task in tasks}
    for name, left in rows.items():
        if not len(left):
            raise RecipeError(
                f"{recipe.run}: all training rows of {name} were learned, none is held out to check a merge on; "
                "learn with a data.train_rows below their number"
            )
    run = open_learned(recipe)
    assert isinstance(run.method, Cmoe)
    held_out = {}
    for task in tasks:
        chosen = rows[task.name].select(range(min(num_rows, len(rows[task.name]))))
        encoding = data.encoding(task, run.backbone.processor, keep=True)
        held_out[task.name] = SampleRows(chosen, encoding, recipe.training.max_length)
    return Subject(run, run.method, held_out)


def largest_feasible(
    subject: Subject, steps: Sequence[Step], before: Mapping[str, float], bound: float, progress: Progress
) -> tuple[tuple[Step, ...], dict[str, float]]:
    """Steps that every task bears together, taken in order where they can be, and the losses with them.

    As many at once as went well before, twice over; what cannot be borne is tried in halves, and a single step that
    cannot is passed over. Steps come in the order of what they change, so after `PATIENCE` of these no more are tried.
    """
    taken, after = list[Step](), dict(before)
    position, stride, passed_over = 0, 1, 0
    while position < len(steps) and passed_over < PATIENCE:
        tried = [*taken, *steps[position : position + stride]]
        with merged(subject, tried):
            measured = losses(subject, partial(progress, f"{len(tried)} of {len(steps)} experts left out"))
        if all(measured[name] <= before[name] + bound for name in before):
            taken, after, passed_over = tried, measured, 0
            position, stride = position + stride, 2 * stride
        elif stride > 1:
            stride //= 2
        else:
            position, passed_over = position + 1, passed_over + 1
    return tuple(taken), after


@contextmanager
def merged(subject: Subject, steps: Sequence[Step]) -> Iterator[None]:
    """Some experts are left out inside."""
    banks = subject.method.host.banks
    whole = {
        site: merge(banks[site], stand_ins) for site, stand_ins in merge_map_of(steps, subject.method.host).items()
    }
    try:
        yield
    finally:
        for site, before in whole.items():
            unmerge(banks[site], before)


@torch.no_grad()
def losses(subject: Subject, at: Progress) -> dict[str, float]:
    """Mean loss per answer token of every learned task's held-out rows, on its own route."""
    method, found = subject.method, {}
    for task, (name, rows) in enumerate(subject.held_out.items()):
        total, num_tokens = 0.0, 0
        for inputs in batches(rows, method.processor, BATCH, method.model.device):
            num_learned = int((inputs["labels"][:, 1:] != IGNORED).sum())
            with method.host.context.use(RoutePlan.single(task), inputs):
                total += num_learned * float(method.model(**inputs, use_cache=False).loss)
            num_tokens += num_learned
        found[name] = total / num_tokens
    return found


def accuracies(subject: Subject, folder: Path, progress: Progress) -> dict[str, float]:
    """Located accuracy of every learned task, in percent; answers that lie in `folder` are not asked again."""
    run = subject.run
    eval_spec: EvalSpec = replace(
        run.eval_spec, folder=folder, settings=run.recipe.evaluation.model_copy(update={"routes": ("located",)})
    )
    eval_model = EvalModel(subject.method, subject.method.model, run.backbone.processor)
    questions = eval_sets_of(eval_spec, run.backbone.processor)
    last = len(subject.held_out) - 1
    evaluate_after(eval_spec, questions, eval_model, last, run.processes, partial(progress, "answers"))
    return {eval_spec.sequence.names[cell.task]: cell.accuracy for cell in score_after(eval_spec, last)}


def expert_bytes(subject: Subject) -> int:
    """Bytes of the experts that the model holds now."""
    experts = (bank.experts for bank in subject.method.host.banks.values())
    return ledger.size_of(parameter for stacks in experts for parameter in stacks.parameters()).bytes


def render(record: MergeRecord) -> Table:
    """A row per task, and what it all comes to."""
    kept = sum(stand_in == expert for of_E in record.stand_ins.values() for expert, stand_in in enumerate(of_E))
    total = sum(map(len, record.stand_ins.values()))
    size = record.expert_bytes
    saved = 100 * (1 - size.after / size.before)
    title = f"{kept} of {total} experts stay; {saved:.0f} % of {size.before / 1e6:.1f} MB saved"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("task", style="bold", no_wrap=True)
    for column in ("held-out rows", "loss", "merged", "accuracy", "merged"):
        table.add_column(column, justify="right")
    for name, num_rows in record.held_out.items():
        loss, accuracy = record.loss[name], record.accuracy[name]
        cells = (f"{loss.before:.3f}", f"{loss.after:.3f}", f"{accuracy.before:.1f}", f"{accuracy.after:.1f}")
        table.add_row(name, str(num_rows), *cells)
    return table


def _pairs(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, BeforeAfter]:
    return {name: BeforeAfter(before=before[name], after=after[name]) for name in before}
