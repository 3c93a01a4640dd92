"""HiDe-LLaVA: the lower layers add every task's adapter, the upper ones mix them by similarity."""

from collections.abc import Callable

import pytest
import tiny
import torch
from formulas import experts_of, through
from tiny import Lesson

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.methods.hide import Hide
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.hide import HideSettings

LOWER, UPPER = (f"model.language_model.layers.{layer}.mlp.down_proj" for layer in (0, 1))


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("hide")


@pytest.fixture
def method(lesson: Lesson) -> Hide:
    assert isinstance(lesson.run.method, Hide)
    return lesson.run.method


@pytest.mark.parametrize("site", [LOWER, UPPER])
@torch.no_grad()
def test_lower_layers_sum_and_the_upper_one_mixes_by_similarity(lesson: Lesson, method: Hide, site: str):
    batch, bank = lesson.prompts(), method.host.banks[site]
    with through(bank) as calls, method.answering(batch) as location:
        method.model(**batch)
    located = location()
    assert located is not None
    feature_BD = torch.nn.functional.layer_norm(method.locating.features.of(batch).double(), (32,))
    means_ND = torch.stack([lesson.run.registry.load(task)["locator"]["mean"] for task in (0, 1)]).double()
    distance_BN = (feature_BD[:, None] - means_ND).square().mean(dim=-1)
    d_BN = (-distance_BN / 0.2).softmax(dim=1)
    assert d_BN.min() > 0.01
    *_, (x_BTI, y_BTO) = calls  # after the pass that locates
    for x_TI, y_TO, d_N in zip(x_BTI, y_BTO, d_BN, strict=True):
        expected_TO = x_TI @ bank.frozen.frozen.weight.double().T
        for (a_RI, b_OR), weight in zip(experts_of(bank).values(), [1, 1] if site == LOWER else d_N, strict=True):
            expected_TO = expected_TO + weight * 8 / 4 * x_TI @ a_RI.T @ b_OR.T
        torch.testing.assert_close(y_TO, expected_TO, rtol=0, atol=1e-5)


def test_a_task_learns_as_if_it_were_alone(lesson_of: Callable[[str], Lesson], lesson: Lesson):
    alone = lesson_of("lora_per_task")
    for index in (0, 1):
        left, right = (one.run.registry.load(index)["experts"] for one in (lesson, alone))
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_no_layer_mixes_and_all_do(lesson: Lesson):
    for mixed in (0, 2):
        backbone = load_backbone(lesson.recipe.backbone)
        method = Hide(HideSettings(**tiny.LORA, mixed_layers=mixed), backbone.model, backbone.processor, seed=0)
        for index in (0, 1):
            method.restore(lesson.run.registry.load(index))
        first, second = (lesson.logits_of(method, task) for task in (0, 1))
        assert torch.equal(first, second) == (mixed == 0)


def test_more_layers_than_there_are_is_an_error(lesson: Lesson):
    backbone = load_backbone(lesson.recipe.backbone)
    with pytest.raises(RecipeError, match="mixed_layers is 3, but this model's LLM has 2 layers"):
        Hide(HideSettings(mixed_layers=3), backbone.model, backbone.processor, seed=0)
