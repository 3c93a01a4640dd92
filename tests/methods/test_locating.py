"""Every kind of locator, feature and selection serves a whole run, and comes back from its folder."""

from pathlib import Path

import pytest
import tiny
import torch
from tiny import Lesson
from torch import Tensor

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.locators import LOCATORS
from llava_cmoe.methods.base import Method
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.records import Located
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry

SMALL = ("data.train_rows=12", "data.eval_rows=4", "evaluation.routes=[located]", "method.locator.epochs=5")
LESSONS = {
    "vae": ("error=elbo", "feature=text", "layer=1"),
    "autoencoder": ("feature=mean", "selection=soft", "temperature=2.0"),
    "ppca": ("feature=both", "layer=0", "free=true", "score=raw", "latent=3"),
    "gaussian": ("feature=vision", "score=raw"),
    "prototype": ("score=raw", "selection=soft", "num_mixed=3", "unseen_threshold=1000.0"),
}
"""Kind of locator to other settings of its run: each setting is met once."""


def test_every_kind_has_a_lesson():
    assert LESSONS.keys() == LOCATORS.keys()


@pytest.mark.parametrize("kind", LESSONS)
def test_a_run_learns_answers_and_comes_back(kind: str, tiny_data: Path, tiny_backbone: Path, tmp_path: Path):
    settings = (f"method.locator.{setting}" for setting in (f"kind={kind}", *LESSONS[kind]))
    recipe = tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "cmoe", *SMALL, *settings)
    lesson = tiny.attend(recipe)
    restored = restore_method(recipe, load_backbone(recipe.backbone), Registry(recipe.run))
    prompts = lesson.prompts()
    (logits, located), (logits_again, again) = (answer(method, prompts) for method in (lesson.run.method, restored))
    assert torch.equal(located.score_BN, again.score_BN) and torch.isfinite(located.score_BN).all()
    assert (located.tasks_BK.shape[1] > 1) == ("selection=soft" in LESSONS[kind]) != restored.answers_by_task
    assert torch.equal(logits_again, logits)
    with torch.no_grad(), lesson.run.method.host.context.use(RoutePlan.of(located), prompts):
        assert torch.equal(lesson.run.method.model(**prompts).logits, logits)  # of the very mixture
    assert lesson.results.locator is not None and None not in lesson.results.routes["located"].matrix[-1]


def answer(method: Method, prompts: dict[str, Tensor]) -> tuple[Tensor, Located]:
    """Logits on the route that the method finds, and that route."""
    with torch.no_grad(), method.answering(prompts) as location:
        logits_BTV = method.model(**prompts).logits
        located = location()
    assert located is not None
    return logits_BTV, located


# Soft selection.


def logits(lesson: Lesson, method: Cmoe, tasks: list[list[int]], weights: list[list[float]]) -> Tensor:
    prompts, plan = lesson.prompts(), RoutePlan.of(Located(torch.tensor(tasks), torch.tensor(weights)))
    with torch.no_grad(), method.host.context.use(plan, prompts):
        logits_BTV: Tensor = method.model(**prompts).logits
    return logits_BTV


def test_a_mixture_of_one_task_is_that_tasks_route_bit_for_bit(lesson: Lesson, method: Cmoe):
    for task in (0, 1):
        assert torch.equal(logits(lesson, method, [[task]] * 4, [[1.0]] * 4), lesson.logits_of(method, task))


def test_a_task_of_no_weight_does_not_answer(lesson: Lesson, method: Cmoe):
    mixed = logits(lesson, method, [[0, 1]] * 2 + [[1, 0]] * 2, [[1.0, 0.0]] * 4)
    apart = torch.cat([lesson.logits_of(method, 0)[:2], lesson.logits_of(method, 1)[2:]])
    torch.testing.assert_close(mixed, apart, rtol=0, atol=1e-6)


def test_a_mixture_is_neither_of_its_tasks_and_does_not_know_their_order(lesson: Lesson, method: Cmoe):
    mixed = logits(lesson, method, [[0, 1]] * 4, [[0.7, 0.3]] * 4)
    swapped = logits(lesson, method, [[1, 0]] * 4, [[0.3, 0.7]] * 4)
    torch.testing.assert_close(mixed, swapped, rtol=0, atol=1e-6)
    for task in (0, 1):
        assert (mixed - lesson.logits_of(method, task)).abs().max() > 1e-4


def test_a_prompt_that_no_task_fits_gets_the_base_models_answer_beside_mixed_ones(lesson: Lesson, method: Cmoe):
    mixed = logits(lesson, method, [[0, 1], [-1, -1], [1, 0], [-1, -1]], [[0.7, 0.3], [0, 0]] * 2)
    torch.testing.assert_close(mixed[1::2], lesson.base[1::2], rtol=0, atol=1e-6)
    assert torch.equal(logits(lesson, method, [[-1, -1]] * 4, [[0.0, 0.0]] * 4), lesson.base)
