"""Merging a finished run: as many experts left out as every task bears, checked on rows that it never learned.

The pool of experts grows with every task; some are little used, some compute what another one computes. Those are left
out in the order of what that changes (`experts/redundancy.py`), as many as keep every task's held-out loss within a
bound. Learning goes on from the run as it was: a merge is an entry beside it, for answering (`registry/merges.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from rich import box
from rich.table import Table
from torch.utils.data import DataLoader

from llava_cmoe.data.coin import read_train
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import IGNORED, tokenizer_of
from llava_cmoe.data.encoding import SampleRows
from llava_cmoe.evaluation.generate import Candidate
from llava_cmoe.evaluation.runner import Exam, encode_questions, evaluate_after, score_after
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.merging.redundancy import Redundancy, Step, stand_ins_of
from llava_cmoe.merging.store import BeforeAfter, MergeRecord, Merges
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.provenance.versions import versions
from llava_cmoe.registry.restore import restore_stage
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.sequence import Progress, Run, check_data, leave, open_run
from llava_cmoe.settings.base import RecipeError
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
        progress: told what is being measured.

    Raises:
        RecipeError: the run's method has no experts, or it learned all training rows, so that none is held out.
        RegistryError: no task is learned.
    """
    subject = open_subject(recipe, num_rows)
    host, registry, merges = subject.method.host, subject.run.registry, Merges(subject.run.registry)
    redundancy = Redundancy(host)
    with redundancy.watch():
        before = losses(subject, partial(progress, "use and likeness"))
    steps = tuple(redundancy.steps())
    steps, after = most(subject, steps, before, bound, progress)
    accuracy_before = accuracies(subject, subject.run.exam.folder, progress)
    bytes_before, merge = expert_bytes(subject), stand_ins_of(steps, host)
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
    return record, merges.commit(record)


def open_subject(recipe: Recipe, num_rows: int) -> Subject:
    """Bring a run's learned tasks back, and read rows of theirs that were not learned."""
    run = open_run(recipe)
    if not isinstance(run.method, Cmoe):
        raise RecipeError(f"{recipe.run}: method {recipe.method.name} has no pool of experts to merge; cmoe has")
    check_data(run)
    records = run.registry.records()
    if not records:
        raise RegistryError(f"{recipe.run}: nothing is learned yet; train the run, then merge it")
    tasks = run.sequence.tasks[: len(records)]
    held_out = {}
    for task in tasks:
        rows = leave(read_train(recipe.data.root, task), recipe.data.train_rows, recipe.seed)
        if not len(rows):
            raise RecipeError(
                f"{recipe.run}: all training rows of {task.name} were learned, none is held out to check a merge on; "
                "learn with a data.train_rows below their number"
            )
        chosen: Dataset = rows.select(range(min(num_rows, len(rows))))
        held_out[task.name] = SampleRows(
            chosen,
            run.backbone.processor,
            recipe.training.max_length,
            task.geometry,
            keep=True,
            max_pixels=recipe.data.max_pixels,
        )
    for index in range(len(records)):
        restore_stage(run.method, run.registry, index, run.backbone)
    return Subject(run, run.method, held_out)


def most(
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
    whole = {site: banks[site].merge(stand_ins) for site, stand_ins in stand_ins_of(steps, subject.method.host).items()}
    try:
        yield
    finally:
        for site, blocks in whole.items():
            banks[site].unmerge(blocks)


@torch.no_grad()
def losses(subject: Subject, at: Progress) -> dict[str, float]:
    """Mean loss per answer token of every learned task's held-out rows, on its own route."""
    method, found = subject.method, {}
    collator = Collator(tokenizer_of(method.processor).pad_token_id)
    for task, (name, rows) in enumerate(subject.held_out.items()):
        total, num_tokens = 0.0, 0
        for batch in DataLoader(rows, batch_size=BATCH, collate_fn=collator):
            inputs = {key: tensor.to(method.model.device) for key, tensor in batch.items()}
            num_learned = int((inputs["labels"][:, 1:] != IGNORED).sum())
            with method.host.context.use(RoutePlan.single(task, inputs["attention_mask"].bool())):
                total += num_learned * float(method.model(**inputs, use_cache=False).loss)
            num_tokens += num_learned
        found[name] = total / num_tokens
    return found


def accuracies(subject: Subject, folder: Path, progress: Progress) -> dict[str, float]:
    """Located accuracy of every learned task, in percent; answers that lie in `folder` are not asked again."""
    run = subject.run
    exam: Exam = replace(
        run.exam, folder=folder, settings=run.recipe.evaluation.model_copy(update={"routes": ("located",)})
    )
    candidate = Candidate(subject.method, subject.method.model, run.backbone.processor)
    questions = encode_questions(exam, run.backbone.processor)
    last = len(subject.held_out) - 1
    evaluate_after(exam, questions, candidate, last, run.processes, partial(progress, "answers"))
    return {exam.sequence.names[cell.task]: cell.accuracy for cell in score_after(exam, last)}


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
