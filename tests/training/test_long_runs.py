"""What long runs are given for memory and speed changes what they cost, and what they learn only where it says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llava_cmoe import sequence
from llava_cmoe.data.collator import Collator
from llava_cmoe.evaluation.eval_spec import eval_sets_of
from llava_cmoe.registry.schema import TaskRecord
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.run import Run, open_run
from llava_cmoe.settings.run import Recipe
from llava_cmoe.training.stage import StageTrainer

Learn = Callable[..., tuple[TaskRecord, ...]]
SMALL = ("data.train_rows=12", "data.eval_rows=1", "evaluation.routes=[oracle]")
BEFORE_THE_LLM = "method.experts.also_in=[vision, projector]"
CHECKPOINTED = (
    ("cmoe", "method.locator.epochs=2", BEFORE_THE_LLM, "backbone.quantization=nf4"),
    ("moelora",),
    ("sequential_lora", "method.dropout=0.1"),
)


@pytest.fixture
def recipe_in(tmp_path: Path, tiny_data: Path, tiny_backbone: Path) -> Callable[..., Recipe]:
    """A small recipe in a folder of its own."""

    def make(place: str, method: str, *overrides: str) -> Recipe:
        return tiny.recipe(tmp_path / place / "run", tiny_data, tiny_backbone, method, *SMALL, *overrides)

    return make


@pytest.fixture
def learn(recipe_in: Callable[..., Recipe]) -> Learn:
    """The records of a small run."""

    def records(place: str, method: str, *overrides: str) -> tuple[TaskRecord, ...]:
        recipe = recipe_in(place, method, *overrides)
        sequence.learn(recipe)
        return Registry(recipe.run).records()

    return records


@pytest.mark.parametrize("learned", CHECKPOINTED, ids=lambda learned: learned[0])
def test_checkpointing_learns_the_same_bits(learn: Learn, learned: tuple[str, ...]):
    plain, checkpointed = (
        learn("plain", *learned),
        learn("checkpointed", *learned, "training.gradient_checkpointing=true"),
    )
    assert [record.files for record in checkpointed] == [record.files for record in plain]
    assert [record.facts for record in checkpointed] == [record.facts for record in plain]  # losses, growth


def test_checkpointing_runs_layers_again_until_the_stage_ends(
    recipe_in: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    runs: list[Run] = []
    opened, step = sequence.open_run, StageTrainer.training_step

    def open_run(*args: Any, **kwargs: Any) -> Run:
        runs.append(opened(*args, **kwargs))
        layer = runs[0].method.model.model.language_model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        return runs[0]

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.clear()
        loss = step(*args, **kwargs)
        assert len(calls) == 2
        return loss

    monkeypatch.setattr(sequence, "open_run", open_run)
    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    sequence.learn(recipe_in("run", "moelora", "training.gradient_checkpointing=true", "data.tasks=[sides]"))
    assert calls and not any(getattr(part, "gradient_checkpointing", False) for part in runs[0].method.model.modules())


def test_workers_encode_the_same_batches_and_the_run_is_the_same(learn: Learn):
    alone = learn("run", "sequential_lora", "data.workers=0")
    helped = learn("helped/run", "sequential_lora", "data.workers=2")
    assert helped[-1].sha256 == alone[-1].sha256  # of every tensor and fact, through the chain of records
    assert learn("helped/run", "sequential_lora") == helped  # the run is not refused without them


def test_grouped_steps_hold_one_kind_of_rows_and_learn(learn: Learn, monkeypatch: pytest.MonkeyPatch):
    pictures: list[tuple[int, int]] = []
    collate = Collator.__call__

    def watched(collator: Collator, rows: Any) -> dict[str, torch.Tensor]:
        if "labels" in rows[0]:
            pictures.append((len(rows), sum("pixel_values" in row for row in rows)))
        return collate(collator, rows)

    monkeypatch.setattr(Collator, "__call__", watched)
    overrides = ("data.tasks=[colours]", "data.train_rows=24", "training.group_by_length=true", "training.epochs=2")
    (record,) = learn("run", "sequential_lora", *overrides)
    assert record.facts["training"]["steps"] == 2 * 6 and record.facts["training"]["samples"] == tiny.NUM_TRAIN
    # Of 24 rows 6 have no picture: in each epoch one step of 4 is text alone, one is mixed from what is left.
    assert sorted(pictures) == sorted(2 * [(4, 0), (4, 2), *4 * [(4, 4)]])


def test_pictures_above_the_limit_are_learned_and_asked_smaller(learn: Learn, recipe_in: Callable[..., Recipe]):
    changed = ("data.tasks=[sides]", "data.max_pixels=100")
    small, whole = learn("small", "sequential_lora", *changed), learn("whole", "sequential_lora", changed[0])
    assert small[0].files != whole[0].files
    run = open_run(recipe_in("asked", "sequential_lora", *changed))
    pictures = [
        eval_sets_of(eval_spec, run.backbone.processor)["sides"].prompts[0]["pixel_values"]
        for eval_spec in (run.eval_spec, open_run(recipe_in("asked", "sequential_lora", changed[0])).eval_spec)
    ]
    assert pictures[0].shape == pictures[1].shape and not torch.equal(*pictures)
