"""Methods learn beside quantized weights as beside others, and the quantized weights stay what they are."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from tiny import Lesson, backbone_weights

from llava_cmoe import sequence
from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry

LEARNED = [("cmoe", "nf4"), ("sequential_lora", "nf4"), ("moelora", "nf4"), ("cmoe", "8bit")]


@pytest.fixture(params=LEARNED, ids=" ".join)
def lesson(request: pytest.FixtureRequest, lesson_of: Callable[..., Lesson]) -> Lesson:
    method, quantization = request.param
    return lesson_of(method, f"backbone.quantization={quantization}")


def test_installing_leaves_the_logits_as_they_were(lesson: Lesson):
    assert torch.equal(lesson.untrained, lesson.base)


def test_rounding_is_seen_in_the_logits(lesson: Lesson, lesson_of: Callable[..., Lesson]):
    assert not torch.allclose(lesson.base, lesson_of("cmoe").base, atol=1e-4)


def test_every_stage_learns_and_changes_nothing_but_what_is_trained(lesson: Lesson):
    fresh = load_backbone(lesson.recipe.backbone).model.state_dict()
    kept = backbone_weights(lesson.run.method.model)
    assert any(name.endswith(("quant_state.bitsandbytes__nf4", ".SCB")) for name in fresh)
    assert all(torch.equal(kept[name], value) for name, value in fresh.items())
    trained = {name: value.dtype for name, value in lesson.run.method.model.named_parameters() if value.requires_grad}
    assert set(trained.values()) <= {torch.float32}
    records = Registry(lesson.recipe.run).records()
    assert all(record.facts["training"]["last_loss"] < record.facts["training"]["first_loss"] for record in records)
    assert not any(torch.equal(before[0], after[1]) for before, after in pairwise(lesson.logits))


def test_all_layers_learn(lesson: Lesson):
    """Also after answering: a frozen linear that hands no gradient on leaves what lies below it at its start, B = 0."""
    (*_, last) = Registry(lesson.recipe.run).records()
    tensors = Registry(lesson.recipe.run).load(last.index)
    grown = {name: value for group in ("adapter", "experts") for name, value in tensors.get(group, {}).items()}
    ups = {name: value for name, value in grown.items() if name.endswith((".B", "lora_B.weight"))}
    assert ups and all(value.any() for value in ups.values())


def test_every_state_comes_back_from_the_registry_bit_for_bit(lesson: Lesson):
    registry = Registry(lesson.recipe.run)
    for stage, logits in enumerate(lesson.logits):
        method = restore_method(lesson.recipe, load_backbone(lesson.recipe.backbone), registry, stages=stage + 1)
        for task, expected in enumerate(logits):
            assert torch.equal(lesson.logits_of(method, task), expected)


def test_a_run_goes_on_with_its_own_quantization_only(lesson: Lesson, tiny_data: Path, tmp_path: Path):
    other = lesson.recipe.backbone.model_copy(update={"quantization": "none"})
    with pytest.raises(RegistryError, match=r"backbone.quantization \(was '(nf4|8bit)', now 'none'\)"):
        sequence.learn(lesson.recipe.model_copy(update={"backbone": other}))
    with pytest.raises(RegistryError, match="colours was learned with backbone.quantization (nf4|8bit), .* has none"):
        restore_method(lesson.recipe, load_backbone(other), Registry(lesson.recipe.run))


def test_what_was_learned_on_whole_weights_comes_back_on_no_rounded_ones(lesson_of: Callable[..., Lesson]):
    lesson = lesson_of("cmoe")
    four = lesson.recipe.backbone.model_copy(update={"quantization": "nf4"})
    with pytest.raises(RegistryError, match="learned with backbone.quantization none, this backbone has nf4"):
        restore_method(lesson.recipe, load_backbone(four), Registry(lesson.recipe.run))


def test_two_runs_are_the_same_bits(lesson_of: Callable[..., Lesson], tiny_data, tiny_backbone, tmp_path: Path):
    lesson = lesson_of("cmoe", "backbone.quantization=nf4")
    sequence.learn(tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "cmoe", "backbone.quantization=nf4"))
    last, again = (Registry(run).records()[-1] for run in (lesson.recipe.run, tmp_path / "run"))
    assert last.files == again.files


def test_experts_are_learned_in_bfloat16_where_asked_for(lesson_of: Callable[..., Lesson]):
    lesson = lesson_of("cmoe", "backbone.quantization=nf4", "method.experts.dtype=bfloat16")
    registry = Registry(lesson.recipe.run)
    tensors = [registry.load(record.index) for record in registry.records()]
    assert {value.dtype for task in tensors for value in task["experts"].values()} == {torch.bfloat16}
    assert {value.dtype for task in tensors for value in task["routers"].values()} == {torch.float32}
    assert torch.equal(lesson.untrained, lesson.base) and not torch.equal(lesson.logits[-1][-1], lesson.base)
    restored = restore_method(lesson.recipe, load_backbone(lesson.recipe.backbone), registry)
    assert torch.equal(lesson.logits_of(restored, 1), lesson.logits[-1][1])
