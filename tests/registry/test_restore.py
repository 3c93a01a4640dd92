"""A run's state after any stage comes back from its folder alone, and only onto the backbone it was learned on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Lesson

from llava_cmoe.backbones.loading import Backbone, load_backbone
from llava_cmoe.registry.restore import build_method, restore_method
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry


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
    with pytest.raises(ValueError, match="asks for task 1"):
        lesson.logits_of(method, 1)


def test_without_a_stage_it_is_the_method_before_it_learned(lesson: Lesson, backbone: Backbone):
    method = restore_method(lesson.recipe, backbone, Registry(lesson.recipe.run), stages=0)
    assert torch.equal(lesson.logits_of(method, -1), lesson.base)
    other = build_method(lesson.recipe, load_backbone(lesson.recipe.backbone))
    assert method.model.state_dict().keys() == other.model.state_dict().keys()


def test_the_locator_comes_back_with_the_experts(lesson: Lesson, backbone: Backbone):
    prompts = lesson.prompts()
    restored = restore_method(lesson.recipe, backbone, Registry(lesson.recipe.run)).locate(prompts)
    live = lesson.run.method.locate(prompts)
    assert restored is not None and live is not None
    assert torch.equal(restored.score_BN, live.score_BN) and torch.equal(restored.task_B, live.task_B)


def test_a_stage_that_is_not_learned_is_refused(lesson: Lesson, backbone: Backbone):
    with pytest.raises(RegistryError, match="2 stages are learned, not 3"):
        restore_method(lesson.recipe, backbone, Registry(lesson.recipe.run), stages=3)


def test_another_backbone_is_refused(lesson: Lesson, tmp_path: Path):
    folder = shutil.copytree(lesson.recipe.backbone.path, tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    other = load_backbone(lesson.recipe.backbone.model_copy(update={"path": str(folder)}))
    with pytest.raises(RegistryError, match="colours was learned on another backbone .* set backbone.path"):
        restore_method(lesson.recipe, other, Registry(lesson.recipe.run))
