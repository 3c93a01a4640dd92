"""The continual run, as the paper describes it: for each task probe, grow, train, locate; commit; evaluate.

A run that was killed goes on with the same call: what is committed is restored instead of learned, and what is answered
is not asked again. How a task is learned is its method's (`methods/cmoe.py`); opening a run is `runs/`'s.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import partial

from accelerate.utils import broadcast_object_list
from transformers import set_seed

from llava_cmoe.evaluation.aggregate import aggregate
from llava_cmoe.evaluation.eval_spec import answered, discard_answers, eval_sets_of
from llava_cmoe.evaluation.generate import EvalModel, EvalSet
from llava_cmoe.evaluation.log import Results, check_answers, write_results
from llava_cmoe.evaluation.runner import evaluate_after
from llava_cmoe.methods.base import Stage
from llava_cmoe.provenance.invocations import Call, append_invocation, forget_missing_answers, read_invocations
from llava_cmoe.registry.restore import restore_stage
from llava_cmoe.runs.facts import call_of, facts_of_run
from llava_cmoe.runs.progress import place
from llava_cmoe.runs.run import Progress, Run, begin, done_stages, open_run, subset_folder
from llava_cmoe.runs.stage import At, discard_checkpoints, fit_fn, stage_data
from llava_cmoe.settings.run import Recipe
from llava_cmoe.training.trackers import trackers_of


@dataclass
class Done:
    """What this call did so far: stages that it learned, seconds of evaluation per stage, the calls before it."""

    before: tuple[Call, ...] = ()
    learned: list[str] = field(default_factory=list)
    evaluated: dict[str, float] = field(default_factory=dict)


def learn(recipe: Recipe, progress: Progress = lambda *_: None, force: bool = False) -> Results:
    """Learn the whole sequence, or go on where it was interrupted; every process of a launch calls this.

    Args:
        recipe: of the run; one that was begun goes on with the recipe, data, backbone and processes it was begun with.
        progress: called with what is done.
        force: go on with others, and only warn.
    """
    trackers_of(recipe.training)  # raises for one that is not installed
    run = open_run(recipe, writer=True, force=force)
    begin(run, force)
    if run.processes.is_main_process:
        discard_checkpoints(run)
    return run_stages(run, run.stages, progress)


def evaluate_run(recipe: Recipe, progress: Progress = lambda *_: None) -> Results:
    """Measure what the recipe's run has learned so far, and learn nothing more; every process of a launch calls this.

    Given another subset of the questions than the run's own recipe evaluates, it writes into `subset_folder`.

    Raises:
        RegistryError: nothing is learned yet, or from other data or on another backbone than now.
    """
    stages, folder = done_stages(recipe), subset_folder(recipe)
    run = open_run(recipe)
    run.registry.check_sources(recipe, run.sources)
    return run_stages(
        replace(run, eval_spec=replace(run.eval_spec, folder=folder / run.eval_spec.folder.name)), stages, progress
    )


def run_stages(run: Run, stages: tuple[Stage, ...], progress: Progress) -> Results:
    """Stage by stage: restore what was learned or learn it, then evaluate, and write down how far the run is."""
    questions = eval_sets_of(run.eval_spec, run.backbone.processor, keep=run.recipe.data.keep_encoded)
    records, results = run.registry.records(), None
    done = Done(read_invocations(run.eval_spec.folder.parent))
    settle_answers(run, stages, len(records))
    for index, stage in enumerate(stages):
        at = partial(progress, place(index, [stage.name for stage in stages]))
        if index < len(records):
            restore_stage(run.method, run.registry, records[index], run.backbone)
        elif stage.learns:
            learn_stage(run, index, stage, at)
            done.learned.append(stage.name)
            append(run, done)
        is_new = not answered(run.eval_spec, stage.after)
        began = time.monotonic()
        evaluate(run, questions, stage, at)
        if is_new:
            done.evaluated[stage.name] = time.monotonic() - began
        if is_new or index in (len(records) - 1, len(stages) - 1):  # the call before may have died before it reported
            results = report(run, stages[: index + 1])
            append(run, done)
    assert results is not None, "every method has a stage"
    return results


def settle_answers(run: Run, stages: tuple[Stage, ...], num_learned: int) -> None:
    """Remove answers of models that are yet to be learned; raises if others, not asked again, were changed since."""
    folder, to_learn = run.eval_spec.folder.parent, [stage for stage in stages[num_learned:] if stage.learns]
    if run.processes.is_main_process:
        if to_learn:
            discard_answers(run.eval_spec, to_learn[0].after)
        forget_missing_answers(folder)
    run.processes.wait_for_everyone()
    check_answers(folder, rows=[run.eval_spec.answers_folder(row) for row in range(stages[-1].after + 1)])


def learn_stage(run: Run, index: int, stage: Stage, at: At) -> None:
    """Let the method learn the stage's rows, and commit what it returns."""
    data, began = stage_data(run, index, stage), time.monotonic()
    set_seed(data.seed)
    logs = run.recipe.run / "logs" / f"{index + 1:02d}_{stage.name}"
    learned = run.method.learn(data, fit_fn(run, data, at, logs))
    if run.processes.is_main_process:
        run.registry.commit(
            index,
            stage.name,
            learned,
            data_fingerprint=run.data.fingerprint,
            backbone_fingerprint=run.backbone.fingerprint,
            seconds={**learned.seconds, "total": time.monotonic() - began},
        )
        discard_checkpoints(run)
    run.processes.wait_for_everyone()


def evaluate(run: Run, questions: dict[str, EvalSet], stage: Stage, at: At) -> None:
    """Answer the questions of every task so far, under every route; what is answered already is not asked again."""
    eval_model = EvalModel(run.method, run.method.model, run.backbone.processor)
    evaluate_after(run.eval_spec, questions, eval_model, stage.after, run.processes, at)


def report(run: Run, stages: tuple[Stage, ...]) -> Results:
    """Score the answers after these stages and write `results.json` beside them; one process does, all get it."""
    shared: list[Results] = [None]  # type: ignore[list-item]
    if run.processes.is_main_process:
        shared = [aggregate(run.eval_spec, facts_of_run(run), [stage.after for stage in stages])]
        write_results(run.eval_spec.folder.with_name("results.json"), shared[0])
    broadcast_object_list(shared)
    return shared[0]


def append(run: Run, done: Done) -> None:
    """Write what this call did so far into `manifest.json`, beside the results."""
    if run.processes.is_main_process:
        call = call_of(run, tuple(done.learned), done.evaluated)
        append_invocation(run.eval_spec.folder.parent, done.before, call)
