"""The continual run, as the paper tells it: for each task - probe, grow, train, locate, commit, evaluate.

A run that was killed goes on with the same call: what is committed is restored instead of learned, and what is
answered is not asked again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import set_seed

from llava_cmoe.backbones.feature_store import FeatureStore
from llava_cmoe.backbones.loading import Backbone, load_backbone, reads_images
from llava_cmoe.data.coin import read_eval, read_train, refuse_pictures
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.data.encoding import PromptRows, SampleRows
from llava_cmoe.data.paths import files_of, train_file
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.data.tasks import TaskSequence
from llava_cmoe.evaluation.generate import Candidate, Questions
from llava_cmoe.evaluation.log import Results, RunFacts, Subset, write_results
from llava_cmoe.evaluation.runner import Exam, aggregate, answered, encode_questions, evaluate_after, forget_answers
from llava_cmoe.evaluation.subset import STRATA, stratified
from llava_cmoe.methods.base import Learning, Method, Stage, StageData, Teach
from llava_cmoe.provenance.fingerprints import fingerprint_all, fingerprint_each
from llava_cmoe.provenance.invocations import Call, effective_batch, hardware, revision, tell
from llava_cmoe.provenance.versions import versions
from llava_cmoe.records import Growth, Learned, StageReport
from llava_cmoe.registry.restore import build_method, restore_stage
from llava_cmoe.registry.schema import RegistryError, Sources, recipe_facts
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.data import DataSettings
from llava_cmoe.settings.evaluation import EvaluationSettings
from llava_cmoe.settings.run import Recipe
from llava_cmoe.training.processes import check_engine_holds, processes
from llava_cmoe.training.stage import train_stage
from llava_cmoe.training.trackers import trackers_of

Progress = Callable[[str, str, int, int], None]
"""Called with where the run is (`3/8 imagenet`), what it does (`training`), how much is done, how much there is."""


@dataclass(frozen=True)
class Run:
    """Everything a run works with; `train_rows` and the exam's rows are read and checked before the model is loaded."""

    recipe: Recipe
    sequence: TaskSequence
    train_rows: dict[str, Dataset]
    exam: Exam
    data_files: dict[str, str]
    data_fingerprint: str
    backbone: Backbone
    method: Method
    registry: Registry
    processes: PartialState

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is learned in one go, in order."""
        return self.method.stages(self.sequence.names)

    @property
    def sources(self) -> Sources:
        """What it learns from, and on, by content."""
        return Sources(data_files=self.data_files, backbone_fingerprint=self.backbone.fingerprint)


def learn(recipe: Recipe, progress: Progress = lambda *_: None, anyway: bool = False) -> Results:
    """Learn the whole sequence, or go on where it was interrupted; every process of a launch calls this.

    Args:
        recipe: of the run; one that was begun goes on with the recipe, data, backbone and processes it was begun with.
        progress: told what is done.
        anyway: go on with others, and only warn.
    """
    trackers_of(recipe.training)  # raises for one that is not installed
    run = open_run(recipe, writer=True)
    check_lengths(run)  # before the recipe is written down, so that its limit can still be raised
    if run.processes.is_main_process:
        run.registry.open_run(recipe, run.processes.num_processes, anyway, run.sources)
    run.processes.wait_for_everyone()
    return walk(run, run.stages, progress)


def evaluate_run(recipe: Recipe, progress: Progress = lambda *_: None) -> Results:
    """Measure what the recipe's run has learned so far, and learn nothing more; every process of a launch calls this.

    Asked another subset of the questions than the run's own recipe asks, it writes into `subset_folder`.

    Raises:
        RegistryError: nothing is learned yet.
    """
    run = open_run(recipe)
    run = replace(run, exam=replace(run.exam, folder=subset_folder(recipe) / run.exam.folder.name))
    num_learned = len(run.registry.records())
    done = tuple(stage for index, stage in enumerate(run.stages) if index < num_learned or not stage.learns)
    if not done:
        raise RegistryError(f"{recipe.run}: nothing is learned yet; train the run, then evaluate it")
    check_data(run)
    return walk(run, done, progress)


def subset_folder(recipe: Recipe) -> Path:
    """Where a subset of questions is measured: the run's folder if its recipe asks it, else `subsets/50_0` in there."""
    asked, own = recipe.evaluation, Registry(recipe.run).recipe().evaluation
    if asked.limit == own.limit and (asked.limit is None or asked.subset_seed == own.subset_seed):
        return recipe.run
    return recipe.run / "subsets" / ("all" if asked.limit is None else f"{asked.limit}_{asked.subset_seed}")


def walk(run: Run, stages: tuple[Stage, ...], progress: Progress) -> Results:
    """Stage by stage: bring back what was learned or learn it, then evaluate."""
    questions = encode_questions(run.exam, run.backbone.processor, keep=run.recipe.data.keep_encoded)
    num_learned, learned, asked = len(run.registry.records()), [], {}
    for index, stage in enumerate(stages):
        at = partial(progress, f"{index + 1}/{len(stages)} {stage.name}")
        if index < num_learned:
            restore_stage(run.method, run.registry, index, run.backbone)
        elif stage.learns:
            learn_stage(run, index, stage, at)
            learned.append(stage.name)
        clock, known = Clock(), answered(run.exam, stage.after)
        evaluate(run, questions, stage, at)
        if not known:
            asked[stage.name] = clock.lap("asking")
    results = report(run, stages)
    if run.processes.is_main_process:
        tell(run.exam.folder.parent, call_of(run, tuple(learned), asked))
    return results


def learn_stage(run: Run, index: int, stage: Stage, at: Callable[[str, int, int], None]) -> None:
    """Probe, grow, train, locate, commit."""
    data = stage_data(run, index, stage)
    if run.processes.is_main_process:
        forget_answers(run.exam, stage.after)
    teach = teacher(run, data, at, logs=run.recipe.run / "logs" / f"{index + 1:02d}_{stage.name}")
    method, clock = run.method, Clock()
    set_seed(data.seed)
    growth = method.before_task(data, teach)
    clock.lap("growing")
    trained = teach(data.samples, method.learning, label="training")
    clock.lap("training")
    learned = method.after_task(data, growth)
    clock.lap("locating")
    if run.processes.is_main_process:
        run.registry.commit(
            index,
            stage.name,
            Learned(learned.tensors, {**learned.facts, **facts_of(growth, trained)}),
            data_fingerprint=run.data_fingerprint,
            backbone_fingerprint=run.backbone.fingerprint,
            seconds={**clock.laps, "probing": growth.probe_seconds},
        )
        shutil.rmtree(scaffold(run, index, stage.name), ignore_errors=True)
    run.processes.wait_for_everyone()


def evaluate(run: Run, questions: dict[str, Questions], stage: Stage, at: Callable[[str, int, int], None]) -> None:
    """Measure every task so far, under every route; what is answered already is not asked again."""
    candidate = Candidate(run.method, run.method.model, run.backbone.processor)
    evaluate_after(run.exam, questions, candidate, stage.after, run.processes, at)


def report(run: Run, stages: tuple[Stage, ...]) -> Results:
    """Score the answers after these stages and write `results.json` beside them; one process does, all are told."""
    told: list[Results] = [None]  # type: ignore[list-item]
    if run.processes.is_main_process:
        told = [aggregate(run.exam, facts_of_run(run), [stage.after for stage in stages])]
        write_results(run.exam.folder.with_name("results.json"), told[0])
    broadcast_object_list(told)
    return told[0]


def open_run(recipe: Recipe, writer: bool = False) -> Run:
    """Read the data, then load the backbone and put the method on it; only a `writer` may commit tasks."""
    launched, sequence = processes(), sequence_of(recipe)
    root, seed = recipe.data.root, recipe.seed
    train_rows = {task.name: draw(read_train(root, task), recipe.data.train_rows, seed) for task in sequence.tasks}
    exam = exam_of(recipe.data, recipe.evaluation, seed, recipe.run)
    files = fingerprints_of(recipe.data)
    if not reads_images(recipe.backbone):
        refuse_pictures(root, sequence.tasks)
    check_engine_holds(recipe)
    backbone = load_backbone(recipe.backbone)
    backbone.model.to(launched.device)
    return Run(
        recipe=recipe,
        sequence=sequence,
        train_rows=train_rows,
        exam=exam,
        data_files=files,
        data_fingerprint=fingerprint_all(files),
        backbone=backbone,
        method=build_method(recipe, backbone),
        registry=Registry(recipe.run, writer=writer and launched.is_main_process),
        processes=launched,
    )


def exam_of(data: DataSettings, evaluation: EvaluationSettings, seed: int, folder: Path) -> Exam:
    """What a run is asked, its answers in `folder`; reads and checks the evaluation rows, needs no model."""
    sequence, limit, subset_seed = tasks_of(data), evaluation.limit, evaluation.subset_seed
    rows = {task.name: draw(read_eval(data.root, task), data.eval_rows, seed) for task in sequence.tasks}
    asked = {name: stratified(found, limit, subset_seed) for name, found in rows.items()}
    of = {name: len(found) for name, found in rows.items()}
    subset = None if limit is None else Subset(limit=limit, seed=subset_seed, strata=STRATA, of=of)
    return Exam(sequence, asked, folder / "answers", evaluation, seed, data.max_pixels, subset)


def fingerprints_of(data: DataSettings) -> dict[str, str]:
    """Sha256 of every file that says what is learned and asked, by its name in the data root."""
    files = [file for task in tasks_of(data).tasks for file in files_of(data.root, task)]
    return fingerprint_each(files, data.root)


def sequence_of(recipe: Recipe) -> TaskSequence:
    """The tasks a recipe learns, in order."""
    return tasks_of(recipe.data)


def tasks_of(data: DataSettings) -> TaskSequence:
    """The tasks that are named, in order."""
    sequence = load_sequence(data.sequence)
    return sequence if data.tasks is None else sequence.select(data.tasks)


def lacks_pocket(recipe: Recipe) -> bool:
    """Whether a pocket sequence has to be rendered first; any other data a user brings."""
    return sequence_of(recipe).name == "pocket" and not recipe.data.root.exists()


def draw(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """A seeded draw of `count` rows; all of them where fewer exist or none is asked for."""
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=seed).select(range(count))


def leave(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """The rows that `draw` leaves out."""
    kept = len(rows) if count is None else min(count, len(rows))
    return rows.shuffle(seed=seed).select(list(range(kept, len(rows))))


def check_data(run: Run) -> None:
    """Stop if a run was begun with other data than is there now: one run is one sequence, asked the same questions.

    Raises:
        RegistryError: the data, or the backbone, are others; names what differs.
    """
    run.registry.check_sources(run.recipe, run.sources)


def check_lengths(run: Run) -> None:
    """Stop at the first sample that is too long among all that are still to be learned.

    Raises:
        DataError: names the file and the sample.
    """
    num_learned, limit = len(run.registry.records()), run.recipe.training.max_length
    for task in (task for stage in run.stages[num_learned:] for task in stage.learns):
        spec = run.sequence.tasks[task]
        file, max_pixels = train_file(run.recipe.data.root, spec), run.recipe.data.max_pixels
        rows = SampleRows(
            run.train_rows[spec.name], run.backbone.processor, limit, spec.geometry, max_pixels=max_pixels
        )
        rows.check_lengths(file)


def stage_data(run: Run, index: int, stage: Stage) -> StageData:
    """The rows of all tasks a stage learns, as samples and as prompts."""
    recipe, processor = run.recipe, run.backbone.processor
    specs = [run.sequence.tasks[task] for task in stage.learns]
    geometries = {spec.geometry for spec in specs}
    if len(geometries) > 1:
        raise ValueError(f"stage {stage.name}: its tasks differ in geometry ({', '.join(sorted(geometries))})")
    rows, geometry = concatenate_datasets([run.train_rows[spec.name] for spec in specs]), specs[0].geometry
    keep, max_pixels = recipe.data.keep_encoded, recipe.data.max_pixels
    return StageData(
        index=index,
        name=stage.name,
        samples=SampleRows(rows, processor, recipe.training.max_length, geometry, keep, max_pixels),
        prompts=PromptRows(rows, processor, geometry, max_pixels=max_pixels),
        seed=Random(f"{recipe.seed}/{stage.name}").getrandbits(31),
        features=feature_store(run),
    )


def feature_store(run: Run) -> FeatureStore | None:
    """Where features of prompts are kept; of this very backbone as it computes here, to the last bit."""
    folder, machine = run.recipe.data.feature_store, hardware()
    if folder is None:
        return None
    base = {
        "backbone": run.backbone.fingerprint,
        **run.recipe.backbone.model_dump(mode="json", exclude={"path"}),
        "device": [run.method.model.device.type, machine.processor, *machine.gpus],
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return FeatureStore(folder, base)


def teacher(run: Run, data: StageData, at: Callable[[str, int, int], None], logs: Path | None = None) -> Teach:
    """What a method trains with: the run's training settings, one Trainer per call; reports nothing without `logs`."""
    origin = [recipe_facts(run.recipe), run.data_fingerprint, run.backbone.fingerprint]
    made_from = hashlib.sha256(json.dumps(origin).encode()).hexdigest()

    def teach(
        samples: torch.utils.data.Dataset[dict[str, Tensor]], learning: Learning, *, label: str, **changes: float | None
    ) -> StageReport:
        settings = run.recipe.training.model_copy(
            update={key: value for key, value in changes.items() if value is not None}
        )
        return train_stage(
            run.method.model,
            samples,
            learning,
            settings,
            pad_token_id=tokenizer_of(run.backbone.processor).pad_token_id,
            seed=data.seed,
            folder=scaffold(run, data.index, data.name) / label,
            progress=partial(at, label),
            made_from=made_from,
            workers=run.recipe.data.workers,
            logs=None if logs is None else logs / label,
        )

    return teach


def scaffold(run: Run, index: int, name: str) -> Path:
    """Folder of a stage's checkpoints, which go when the stage is committed."""
    return run.recipe.run / "trainer" / f"{index + 1:02d}_{name}"


def facts_of(growth: Growth, trained: StageReport) -> dict[str, object]:
    """What a task's record says about its stage beyond what the method tells; no times."""
    told: dict[str, Growth | StageReport] = {"growth": growth, "training": trained}
    return {
        part: {key: value for key, value in asdict(values).items() if not key.endswith("seconds")}
        for part, values in told.items()
    }


def facts_of_run(run: Run) -> RunFacts:
    """What the results say about the run, read from the registry."""
    recipe, records = run.recipe, run.registry.records()
    return RunFacts(
        run=recipe.run.name,
        method=recipe.method.name,
        seed=recipe.seed,
        recipe=recipe_facts(run.registry.recipe()),  # an evaluation may have measured with other settings than it says
        base=run.backbone.fingerprint,
        data=run.data_fingerprint,
        data_files=run.data_files,
        sites=tuple(getattr(getattr(run.method, "host", None), "banks", ())),
        growth={record.name: record.facts["growth"]["new_experts"] for record in records},
        trainable_parameters={record.name: record.facts["trainable_parameters"] for record in records},
        stored_bytes={record.name: sum(file.bytes for file in record.files.values()) for record in records},
        processes=run.processes.num_processes,
        threads=torch.get_num_threads(),
        versions=versions(),
        seconds={record.name: record.seconds for record in records},
    )


def call_of(run: Run, learned: tuple[str, ...], asked: dict[str, float]) -> Call:
    """What this call did, and on what."""
    num_processes = run.processes.num_processes
    batch = effective_batch(run.recipe.training, num_processes)
    return Call(
        learned=learned,
        asked=asked,
        processes=num_processes,
        effective_batch=batch,
        revision=revision(),
        hardware=hardware(),
    )


class Clock:
    """Seconds per part of a stage."""

    def __init__(self) -> None:
        """Start now."""
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> float:
        """End a part, and tell how long it took."""
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
        return self.laps[name]
