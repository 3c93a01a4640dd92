"""What goes on record about a run and about the call that works on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava_cmoe.data.task_data import TaskData
from llava_cmoe.evaluation.log import RunFacts
from llava_cmoe.evaluation.word_control import word_control
from llava_cmoe.provenance.invocations import Call, effective_batch, hardware, revision
from llava_cmoe.provenance.versions import versions
from llava_cmoe.registry.schema import recipe_facts
from llava_cmoe.runs.run import Run


def facts_of_run(run: Run) -> RunFacts:
    """What the results hold about the run, read from the registry."""
    recipe, records = run.recipe, run.registry.records()
    return RunFacts(
        run=recipe.run.name,
        method=recipe.method.name,
        seed=recipe.seed,
        recipe=recipe_facts(run.registry.recipe()),  # an evaluation may have measured with other settings than it says
        base=run.backbone.fingerprint,
        data=run.data.fingerprint,
        data_files=run.data.files,
        sites=() if run.method.host is None else tuple(run.method.host.banks),
        growth={record.name: record.facts["growth"]["new_experts"] for record in records},
        trainable_parameters={record.name: record.facts["trainable_parameters"] for record in records},
        stored_bytes={record.name: sum(file.bytes for file in record.files.values()) for record in records},
        processes=run.processes.num_processes,
        threads=torch.get_num_threads(),
        versions=versions(),
        words_alone=words_alone(run.data, [record.name for record in records]) if run.method.locates else {},
        seconds={record.name: record.seconds for record in records},
    )


def words_alone(data: TaskData, tasks: Sequence[str]) -> dict[str, float]:
    """What the words of these tasks' questions alone tell of their task."""
    learned, asked = (
        {task: [turns[0]["text"] for turns in rows[task]["turns"]] for task in tasks}
        for rows in (data.train, data.evaluate)
    )
    return word_control(learned, asked)


def call_of(run: Run, learned: tuple[str, ...], evaluated: dict[str, float]) -> Call:
    """What this call did so far, and on what."""
    num_processes = run.processes.num_processes
    return Call(
        learned=learned,
        evaluated=evaluated,
        processes=num_processes,
        effective_batch=effective_batch(run.recipe.training, num_processes),
        revision=revision(),
        hardware=hardware(),
    )
