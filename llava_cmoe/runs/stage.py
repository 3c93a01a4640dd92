"""What one stage of a run learns from, and what it trains with."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from random import Random
from typing import Protocol

import torch
from datasets import concatenate_datasets
from torch import Tensor

from llava_cmoe.backbones.feature_store import FeatureStore
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.data.encoding import PromptRows, SampleRows
from llava_cmoe.data.tasks import TaskSpec
from llava_cmoe.methods.base import FitFn, Stage, StageData, TrainingContext
from llava_cmoe.provenance.invocations import hardware
from llava_cmoe.provenance.versions import versions
from llava_cmoe.records import StageReport
from llava_cmoe.registry.schema import recipe_facts
from llava_cmoe.runs.run import Run
from llava_cmoe.training.stage import train_stage


class At(Protocol):
    """Called while a stage is at work."""

    def __call__(self, what: str, done: int, total: int, loss: float | None = None, /) -> None:
        """What it does (`training`), how much is done and there is; at times the loss."""
        ...


def stage_data(run: Run, index: int, stage: Stage) -> StageData:
    """The rows of all tasks a stage learns, as samples and as prompts, and those of earlier stages if it may use them.

    Raises:
        ValueError: its tasks differ in geometry.
    """
    past = tuple(samples_of(run, earlier) for earlier in run.stages[:index]) if run.method.uses_past else ()
    samples = samples_of(run, stage)
    return StageData(
        index=index,
        name=stage.name,
        samples=samples,
        prompts=PromptRows(samples.rows, run.data.encoding(_spec(run, stage), run.backbone.processor)),
        seed=Random(f"{run.recipe.seed}/{stage.name}").getrandbits(31),
        features=feature_store(run),
        past=past,
    )


def samples_of(run: Run, stage: Stage) -> SampleRows:
    """The rows that a stage learns; encoded when they are read."""
    tasks = [run.data.sequence.tasks[task] for task in stage.learns]
    rows = concatenate_datasets([run.data.train[task.name] for task in tasks])
    encoding = run.data.encoding(_spec(run, stage), run.backbone.processor, run.recipe.data.keep_encoded)
    return SampleRows(rows, encoding, run.recipe.training.max_length)


def _spec(run: Run, stage: Stage) -> TaskSpec:
    """The task whose pictures are those of all tasks of the stage."""
    tasks = [run.data.sequence.tasks[task] for task in stage.learns]
    geometries = sorted({task.geometry for task in tasks})
    if len(geometries) > 1:
        raise ValueError(f"stage {stage.name}: its tasks differ in geometry ({', '.join(geometries)})")
    return tasks[0]


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


def fit_fn(run: Run, data: StageData, at: At, logs: Path | None = None, folder: Path | None = None) -> FitFn:
    """What a method trains with: the run's training settings, one Trainer per call; reports nothing without `logs`.

    Checkpoints lie in `folder`, the run's own of the stage if absent.
    """

    def fit(
        samples: torch.utils.data.Dataset[dict[str, Tensor]],
        training_context: TrainingContext,
        *,
        label: str,
        **changes: float | None,
    ) -> StageReport:
        settings = run.recipe.training.model_copy(
            update={key: value for key, value in changes.items() if value is not None}
        )
        return train_stage(
            run.method.model,
            samples,
            training_context,
            settings,
            pad_token_id=tokenizer_of(run.backbone.processor).pad_token_id,
            seed=data.seed,
            folder=(folder or checkpoint_dir(run, data.index, data.name)) / label,
            progress=partial(at, label),
            config_hash=config_hash(run),
            workers=run.recipe.data.workers,
            logs=None if logs is None else logs / label,
        )

    return fit


def config_hash(run: Run) -> str:
    """Sha256 over all that decides what is learned: recipe, data, backbone."""
    origin = [recipe_facts(run.recipe), run.data.fingerprint, run.backbone.fingerprint]
    return hashlib.sha256(json.dumps(origin).encode()).hexdigest()


def checkpoint_dir(run: Run, index: int, name: str) -> Path:
    """Folder of a stage's checkpoints, which go when the stage is committed."""
    return run.recipe.run / "trainer" / f"{index + 1:02d}_{name}"
