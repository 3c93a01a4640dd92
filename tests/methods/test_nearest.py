"""A task that begins as the nearest learned one can do at once what that one can, and changes nothing of it."""

from pathlib import Path

import pytest
import tiny
import torch
from tiny import Lesson
from torch import Tensor

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.stage import stage_data

NEAREST = (
    *("method.probe.init=nearest_task", "method.probe.near=1", "method.experts.blocks=[attention, ffn]"),
    *("method.probe.max_new_experts=2", "method.experts.router_init_logit=300"),
)


@pytest.fixture(scope="module", params=["all", "none", "need"])
def lesson(
    request: pytest.FixtureRequest, tiny_data: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Lesson:
    run = tmp_path_factory.mktemp("nearest") / "run"
    return tiny.attend(
        tiny.recipe(run, tiny_data, tiny_backbone, "cmoe", *NEAREST, f"method.probe.scope={request.param}")
    )


def test_it_is_learned_on_attention_and_ffn_and_comes_back(lesson: Lesson):
    kinds = {site.rpartition(".")[2] for site in lesson.results.sites}
    assert kinds == {"self_attn", "mlp"}
    first, second = (record.facts["growth"] for record in Registry(lesson.recipe.run).records())
    assert (first["nearest"], first["need"]) == (None, None)
    assert second["nearest"] == 0 and 0 < second["need"] <= 1
    restored = restore_method(lesson.recipe, load_backbone(lesson.recipe.backbone), Registry(lesson.recipe.run))
    for task, logits in enumerate(lesson.logits[1]):
        assert torch.equal(lesson.logits_of(restored, task), logits)
    assert torch.equal(lesson.logits[0][0], lesson.logits[1][0])  # the task it began as is what it was
    assert not torch.equal(lesson.logits[1][0], lesson.logits[1][1])


def test_before_its_first_step_it_answers_as_the_nearest_task(lesson: Lesson):
    recipe = lesson.recipe
    method = restore_method(recipe, load_backbone(recipe.backbone), Registry(recipe.run), stages=1)
    assert isinstance(method, Cmoe)
    data = stage_data(lesson.run, 1, lesson.run.stages[1])
    growth, init = method.probe(data, lambda *args, **kwargs: None)
    method.grow(growth, init, data.seed)
    begun, nearest = (lesson.logits_of(method, task) for task in (1, 0))
    assert distance(begun, nearest) < 0.1 * distance(lesson.base, nearest)


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).norm().item()
