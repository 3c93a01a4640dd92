"""With experts also in the vision encoder and the projector, a run learns, is routed and comes back as ever."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tiny import Lesson
from torch import Tensor
from torch.utils.data import Subset

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW, Collator, dummy_image_row
from llava_cmoe.evaluation.generate import EvalModel, EvalSet, Route, answer_batch
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.methods.base import ExtraLoss, StageData, no_extra_loss
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.methods.pool_use import count, mean_tokens
from llava_cmoe.methods.probing import probe
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.stage import stage_data
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.cmoe import ProbeSettings

VISION, PROJECTOR = "model.vision_tower.encoder.layers.0.mlp", "model.multi_modal_projector"
LLM = tuple(f"model.language_model.layers.{layer}.mlp" for layer in range(2))
ALSO = ("method.experts.also_in=[vision, projector]", "method.probe.scope=all", "data.train_rows=16")
PATCHES = 4


@pytest.fixture(scope="module")
def lesson(tiny_data: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    run = tmp_path_factory.mktemp("also") / "run"
    return tiny.attend(tiny.recipe(run, tiny_data, tiny_backbone, "cmoe", *ALSO))


@pytest.fixture(scope="module")
def method(lesson: Lesson) -> Cmoe:
    assert isinstance(lesson.run.method, Cmoe)
    return lesson.run.method


@pytest.fixture
def collator(method: Cmoe) -> Collator:
    return Collator(method.processor.tokenizer.pad_token_id)


def samples(lesson: Lesson, stage: int) -> Subset[dict[str, Tensor]]:
    """All training rows of a stage; some of the first one's are text only."""
    rows = stage_data(lesson.run, stage, lesson.run.stages[stage]).samples
    return Subset(rows, range(len(rows)))


def text_only(lesson: Lesson) -> list[dict[str, Tensor]]:
    return [row for row in map(samples(lesson, 0).__getitem__, range(16)) if "pixel_values" not in row]


def test_experts_live_and_grow_at_every_site_in_the_order_in_which_the_model_runs_them(lesson: Lesson, method: Cmoe):
    sites = (VISION, PROJECTOR, *LLM)
    assert tuple(method.host.banks) == tuple(lesson.results.sites) == sites
    assert lesson.results.growth == {
        task: dict.fromkeys(sites, number) for task, number in zip(tiny.TASKS, (2, 1), strict=True)
    }
    learned = {name.split(".experts.")[0] for name in lesson.optimized[1] if ".experts." in name}
    assert learned == set(sites)
    for bank in method.host.banks.values():
        assert all(block.B.any(dim=(1, 2)).all() for stack in bank.stacks.values() for block in stack.blocks)


def test_an_untrained_method_is_the_base_model_and_a_trained_one_is_not(lesson: Lesson):
    assert torch.equal(lesson.untrained, lesson.base) and not torch.equal(lesson.logits[0][0], lesson.base)


def test_an_old_task_computes_the_same_bits_after_the_model_grew(lesson: Lesson):
    before, after = (logits[0] for logits in lesson.logits)
    assert torch.equal(before, after) and not torch.equal(after, lesson.logits[1][1])


def test_every_state_comes_back_from_the_registry_bit_for_bit(lesson: Lesson):
    for stage, logits in enumerate(lesson.logits):
        backbone = load_backbone(lesson.recipe.backbone)
        restored = restore_method(lesson.recipe, backbone, Registry(lesson.recipe.run), stages=stage + 1)
        for task, expected in enumerate(logits):
            assert torch.equal(lesson.logits_of(restored, task), expected)


@pytest.mark.parametrize("route", ["oracle", "located", "random"])
def test_answers_of_a_mixed_batch_are_those_of_separate_batches(lesson: Lesson, method: Cmoe, route: str):
    parts = list(lesson.questions.values())
    questions = EvalSet(
        tuple(sample_id for part in parts for sample_id in part.ids),
        tuple(text for part in parts for text in part.texts),
        [part.prompts[index] for part in parts for index in range(len(part.ids))],
        max_new_tokens=3,
    )
    eval_model, chosen = EvalModel(method, method.model, method.processor), Route(route, 1, num_known=2, seed=0)
    batch = range(len(questions.ids))
    together = answer_batch(eval_model, questions, batch, chosen)
    alone = [answer for index in batch for answer in answer_batch(eval_model, questions, [index], chosen)]
    assert [(a.text, a.located) for a in together] == [(a.text, a.located) for a in alone]


def test_a_batch_without_pictures_is_learned_from(lesson: Lesson, method: Cmoe, collator: Collator):
    batch = collator(text_only(lesson)[:2])
    with torch.no_grad(), method.training_context(batch) as extra_loss:
        output = method.model(**batch)
        assert 0 < extra_loss(output) < 3 * lesson.recipe.method.experts.balance_weight


def test_a_dummy_row_runs_the_vision_encoder_and_nobody_counts_its_patches(
    lesson: Lesson, method: Cmoe, collator: Collator
):
    rows = samples(lesson, 0)
    pictured = next(row for row in map(rows.__getitem__, range(len(rows))) if "pixel_values" in row)
    batch = replace(collator, dummy=dummy_image_row(pictured))(text_only(lesson)[:2])
    assert len(batch["pixel_values"]) == 1
    inputs = {name: value for name, value in batch.items() if name != ROW}
    plan = RoutePlan.single(1)
    with torch.no_grad(), method.host.context.use(plan, batch), method.host.context.observe() as seen:
        method.model(**inputs)
    assert not seen.counts[VISION].any() and not seen.counts[PROJECTOR].any()
    assert seen.counts[LLM[0]].sum() == 2 * batch["attention_mask"].sum()


# Probing.


@pytest.mark.parametrize("counted", ["all", "answer"])
def test_sites_before_the_llm_count_the_patches_of_all_pictures(lesson: Lesson, method: Cmoe, counted: str):
    rows = samples(lesson, 0)
    num_pictures = sum("pixel_values" in row for row in map(rows.__getitem__, range(len(rows))))
    assert 0 < num_pictures < len(rows)
    counts = count(method.model, rows, method.processor, method.host, RoutePlan.single(1), counted)
    assert counts[VISION].sum() == 2 * num_pictures * (PATCHES + 1)  # with the class token
    assert counts[PROJECTOR].sum() == 2 * num_pictures * PATCHES


def test_the_mean_token_of_a_site_before_the_llm_is_the_frozen_models_over_all_patches(
    lesson: Lesson, method: Cmoe, collator: Collator
):
    rows, seen = samples(lesson, 0), []
    hook = method.host.banks[PROJECTOR].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad(), method.host.context.use(None):
        for row in map(rows.__getitem__, range(len(rows))):
            method.model(**collator([row]))
    hook.remove()
    means = mean_tokens(method.model, rows, method.processor, method.host)
    torch.testing.assert_close(means[PROJECTOR], torch.cat(seen).mean(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["layer", "global", "all"])
def test_a_task_without_pictures_decides_nothing_where_only_pictures_come(lesson: Lesson, method: Cmoe, scope: str):
    @contextmanager
    def training_context(batch: Batch) -> Iterator[ExtraLoss]:
        yield no_extra_loss

    data = StageData(index=2, name="third", samples=text_only(lesson), prompts=None, seed=0)
    settings = ProbeSettings(fraction=1, holdout=0.5, scope=scope, alpha=3.0)
    host, model = method.host, method.model
    growth, inits = probe(
        model, host, data, method.processor, settings, lambda _: training_context, fit=lambda *_, **__: None
    )
    assert set(growth.frequencies) == set(growth.thresholds) == set(LLM)
    assert set(growth.new_experts) == set(inits) <= set(LLM)
    assert all(init.mean_D.isfinite().all() for init in inits.values())


def test_locating_in_passing_and_experts_before_the_llm_are_refused_together(tiny_data, tiny_backbone, tmp_path: Path):
    free = ("method.locator.free=true", "method.locator.layer=0")
    tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "cmoe", *free)
    with pytest.raises(RecipeError, match="need it before.*leave experts.also_in empty, or set locator.free: false"):
        tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "cmoe", *free, *ALSO)
