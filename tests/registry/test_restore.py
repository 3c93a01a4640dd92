"""A run's state after any stage comes back from its folder alone, and only onto the backbone it was learned on."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Lesson

from llava_cmoe.backbones.loading import Backbone, load_backbone
from llava_cmoe.registry.restore import build_method, restore_method
from llava_cmoe.registry.schema import RegistryError, TaskRecord
from llava_cmoe.registry.store import Registry
from llava_cmoe.sequence import evaluate_run


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("cmoe")


@pytest.fixture
def backbone(lesson: Lesson) -> Backbone:
    return load_backbone(lesson.recipe.backbone)


def test_deleting_the_last_task_gives_back_the_model_of_the_task_before(
    lesson: Lesson, backbone: Backbone, tmp_path: Path
):
    shutil.copytree(lesson.recipe.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/tasks/02_sides")
    method = restore_method(lesson.recipe, backbone, Registry(tmp_path / "run"))
    assert torch.equal(lesson.logits_of(method, 0), lesson.logits[0][0])
    with pytest.raises(ValueError, match="names task 1, but 1 tasks have routers"):
        lesson.logits_of(method, 1)


def test_without_a_stage_it_is_the_method_before_it_learned(lesson: Lesson, backbone: Backbone):
    method = restore_method(lesson.recipe, backbone, Registry(lesson.recipe.run), stages=0)
    assert torch.equal(lesson.logits_of(method, -1), lesson.base)
    other = build_method(lesson.recipe, load_backbone(lesson.recipe.backbone))
    assert method.model.state_dict().keys() == other.model.state_dict().keys()


def test_the_locator_comes_back_with_the_experts(lesson: Lesson, backbone: Backbone):
    prompts = lesson.prompts()
    methods = (restore_method(lesson.recipe, backbone, Registry(lesson.recipe.run)), lesson.run.method)
    restored, live = (method.locating.locate(prompts) for method in methods)
    assert torch.equal(restored.score_BN, live.score_BN) and torch.equal(restored.task_B, live.task_B)


def test_a_stage_that_is_not_learned_is_refused(lesson: Lesson, backbone: Backbone):
    with pytest.raises(RegistryError, match="2 stages are learned, not 3"):
        restore_method(lesson.recipe, backbone, Registry(lesson.recipe.run), stages=3)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the record of each task was read since."""
    counts: Counter[str] = Counter()
    plain = TaskRecord.read.__func__

    def counting(record: type[TaskRecord], path: Path) -> TaskRecord:
        counts[path.parent.name] += 1
        return plain(record, path)

    monkeypatch.setattr(TaskRecord, "read", classmethod(counting))
    return counts


def test_restoring_reads_every_record_once(lesson: Lesson, backbone: Backbone, read: Counter[str]):
    restore_method(lesson.recipe, backbone, Registry(lesson.recipe.run))
    assert read == {"01_colours": 1, "02_sides": 1}


def test_a_run_of_more_stages_reads_no_record_more_often(lesson: Lesson, tmp_path: Path, read: Counter[str]):
    often = []
    for stages in (2, 1):
        run = Path(shutil.copytree(lesson.recipe.run, tmp_path / str(stages)))
        for folder in sorted((run / "tasks").iterdir())[stages:]:
            shutil.rmtree(folder)
        read.clear()
        evaluate_run(lesson.recipe.model_copy(update={"run": run}))
        assert len(read) == stages
        often.append(set(read.values()))
    assert often[0] == often[1] and len(often[0]) == 1


def test_another_backbone_is_refused(lesson: Lesson, tmp_path: Path):
    folder = shutil.copytree(lesson.recipe.backbone.path, tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    other = load_backbone(lesson.recipe.backbone.model_copy(update={"path": str(folder)}))
    with pytest.raises(RegistryError, match="colours was learned on another backbone .* set backbone.path"):
        restore_method(lesson.recipe, other, Registry(lesson.recipe.run))
