"""What holds for every method: it starts as the base model, trains what it says, and comes back from disk."""

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from tiny import METHODS, Lesson, backbone_weights
from torch import Tensor

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.methods import METHODS as KNOWN
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry

FFN, ATTENTION = {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}
BANK = r"model\.language_model\.layers\.\d+\.mlp\."
LINEAR = r"model\.language_model\.layers\.\d+\.(self_attn|mlp(\.frozen)?)\.\w+_proj\."
TRAINS = {
    "sequential_lora": [rf"base_model\.model\.{LINEAR}lora_[AB]\.default\.weight"],
    "joint": [rf"base_model\.model\.{LINEAR}lora_[AB]\.default\.weight"],
    "moelora": [LINEAR + r"experts\.linear\.fresh\.[AB]", LINEAR + r"routers\.task_0"],
    "cmoe": [BANK + r"experts\.(gate|up|down)_proj\.fresh\.[AB]", BANK + r"routers\.task_{stage}"],
}
"""Method to the names of the only parameters that its optimizer may hold, and must hold at least one of each."""


@pytest.fixture(params=METHODS)
def lesson(request: pytest.FixtureRequest, lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of(request.param)


@pytest.fixture(params=TRAINS)
def learned(request: pytest.FixtureRequest, lesson_of: Callable[[str], Lesson]) -> Lesson:
    """The same, of the methods that learn at all."""
    return lesson_of(request.param)


def stages_that_learn(lesson: Lesson) -> list[int]:
    return [index for index, stage in enumerate(lesson.run.stages) if stage.learns]


def widths(lesson: Lesson) -> dict[str, tuple[int, int]]:
    """Input and output width of every linear of the language model's attention and FFNs."""
    model = load_backbone(lesson.recipe.backbone).model
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.model.language_model.named_modules()
        if name.split(".")[-1] in FFN | ATTENTION
    }


def test_the_battery_covers_every_method():
    assert METHODS.keys() == KNOWN.keys() == TRAINS.keys() | {"zero_shot"}


def test_a_method_that_has_not_trained_yet_is_the_base_model(lesson: Lesson):
    start = lesson.logits[0][0] if lesson.untrained is None else lesson.untrained
    assert torch.equal(start, lesson.base)


def test_training_changes_what_the_model_answers(lesson: Lesson):
    changed = not torch.equal(lesson.logits[-1][-1], lesson.base)
    assert changed == bool(stages_that_learn(lesson))


def test_every_state_comes_back_from_the_registry_bit_for_bit(learned: Lesson):
    registry = Registry(learned.recipe.run)
    for stage, logits in enumerate(learned.logits):
        method = restore_method(learned.recipe, load_backbone(learned.recipe.backbone), registry, stages=stage + 1)
        for task, expected in enumerate(logits):
            assert torch.equal(learned.logits_of(method, task), expected)


def test_the_backbone_is_never_touched(lesson: Lesson):
    fresh = load_backbone(lesson.recipe.backbone).model
    kept = backbone_weights(lesson.run.method.model)
    assert all(torch.equal(kept[name], value) for name, value in fresh.named_parameters())


def test_what_is_committed_is_never_changed(learned: Lesson):
    for before, after in zip(learned.files, learned.files[1:], strict=False):
        assert before.items() <= after.items()


def test_an_optimizer_holds_exactly_what_the_method_trains(learned: Lesson):
    assert len(learned.optimized) == len(stages_that_learn(learned))
    for stage, names in enumerate(learned.optimized):
        patterns = [pattern.replace("{stage}", str(stage)) for pattern in TRAINS[learned.recipe.method.name]]
        assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in names)
        assert all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns)


def test_trainable_parameters_follow_the_closed_formula(learned: Lesson):
    linears, settings = widths(learned), learned.recipe.method
    lora = sum(map(sum, linears.values()))
    gates = sum(d_in for d_in, _ in linears.values())
    hidden, inner = next(pair for name, pair in linears.items() if name.endswith("up_proj"))
    experts_so_far: dict[str, int] = {}
    for record in Registry(learned.recipe.run).records():
        match learned.recipe.method.name:
            case "sequential_lora" | "joint":
                expected = settings.rank * lora
            case "moelora":
                expected = settings.rank * lora + settings.num_experts * gates
            case "cmoe":
                grown: Mapping[str, int] = record.facts["growth"]["new_experts"]
                for site, count in grown.items():
                    experts_so_far[site] = experts_so_far.get(site, 0) + count
                routers = hidden * sum(experts_so_far.values())
                expected = sum(grown.values()) * settings.experts.rank * 3 * (hidden + inner) + routers
        assert record.facts["trainable_parameters"] == expected
        assert learned.results.trainable_parameters[record.name] == expected
        stored = Registry(learned.recipe.run).load(record.index)
        tensors: list[Tensor] = [
            t for group in ("adapter", "experts", "routers") for t in stored.get(group, {}).values()
        ]
        assert sum(tensor.numel() for tensor in tensors) == expected
