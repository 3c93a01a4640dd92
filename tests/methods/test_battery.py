"""What holds for every method: it starts as the base model, trains what it says, and comes back from disk."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import METHODS, TASKS, Lesson, backbone_weights

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.experts import ledger
from llava_cmoe.methods import METHODS as KNOWN
from llava_cmoe.planning.growth_schedule import growth_schedule
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.schema import TaskRecord
from llava_cmoe.registry.store import Registry

FFN, ATTENTION = {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}
LAYER = r"model\.language_model\.layers\.\d+\."
BANK = LAYER + r"mlp\."
LINEAR = LAYER + r"(self_attn|mlp)\.\w+_proj\."
ADAPTER = [rf"base_model\.model\.{LINEAR}lora_[AB]\.default\.weight"]
OF_LINEARS, OF_FFNS = r"experts\.linear\.trainable\.[AB]", r"experts\.(gate|up|down)_proj\.trainable\.[AB]"
SHALLOW, DEEP = LINEAR.replace(r"\d+", "0"), LINEAR.replace(r"\d+", "1")
TRAINS: dict[str, list[str]] = {
    "sequential_lora": ADAPTER,
    "joint": ADAPTER,
    "replay": ADAPTER,
    "ewc": ADAPTER,
    "lwf": ADAPTER,
    "o_lora": [LINEAR + OF_LINEARS],
    "reg_lora": [LINEAR + OF_LINEARS],
    "merging": [LINEAR + OF_LINEARS],
    "lora_per_task": [LINEAR + OF_LINEARS],
    "hide": [LINEAR + OF_LINEARS],
    "moelora": [LINEAR + OF_LINEARS, LINEAR + r"router\.task_0"],
    "inc_moelora": [BANK + OF_FFNS, BANK + r"router\.newest"],
    "dymoe": [BANK + OF_FFNS, BANK + r"router\.newest"],
    "moe_adapters": [BANK + OF_FFNS, BANK + r"router\.(weight|noise)"],
    "care": [BANK + OF_FFNS, BANK + r"router\.(perceptron|router)_{stage}"],
    "patch_routing": [BANK + OF_FFNS, BANK + r"router\.(keys|into|out_of)_{stage}"],
    "pmoe": [DEEP + OF_LINEARS, LAYER.replace(r"\d+", "1") + r"self_attn\.q_proj\.router\.weight"],
    "r2moe": [BANK + OF_FFNS, BANK + r"router\.delta"],
    "cmoe": [BANK + OF_FFNS, BANK + r"router\.task_{stage}"],
}
"""Method to the names of the only parameters that its optimizer may hold, and must hold at least one of each."""
FIXED = {"o_lora", "reg_lora", "merging", "lora_per_task", "hide", "pmoe"}
"""Methods that answer a given task with fixed weights of their experts."""
FIRST = {"pmoe": [SHALLOW + OF_LINEARS]}
"""The same of what only the first task trains."""


@dataclass(frozen=True)
class Widths:
    """Sums over the tiny language model's linears and layers, for the closed formulas."""

    lora: int
    """Of input and output widths, over all linears: parameters of rank 1 in each."""
    deep: int
    """The same over the upper layer."""
    inputs: int
    """Of input widths, over all linears."""
    hidden: int
    inner: int
    layers: int

    @property
    def ffn(self) -> int:
        """Parameters of rank 1 in one FFN."""
        return 3 * (self.hidden + self.inner)


Formula = Callable[[Widths, Any, TaskRecord], tuple[int, int]]
"""Widths, the method's settings and a stage's record to the parameters it trained, and how many its directory holds."""


def of_adapter(widths: Widths, settings: Any, record: TaskRecord) -> tuple[int, int]:
    trained = settings.rank * widths.lora
    return trained, trained


def of_moelora(widths: Widths, settings: Any, record: TaskRecord) -> tuple[int, int]:
    trained = settings.rank * widths.lora + settings.num_experts * widths.inputs
    return trained, trained


def of_inc_moelora(widths: Widths, settings: Any, record: TaskRecord) -> tuple[int, int]:
    trained = settings.num_new * (settings.rank * widths.ffn + widths.hidden) * widths.layers
    return trained, trained


def of_moe_adapters(widths: Widths, settings: Any, record: TaskRecord) -> tuple[int, int]:
    trained = settings.num_experts - settings.num_frozen * record.index  # of two tasks
    found = (
        trained * settings.rank * widths.ffn * widths.layers + 2 * settings.num_experts * widths.hidden * widths.layers
    )
    return found, found


def of_care(widths: Widths, settings: Any, record: TaskRecord) -> tuple[int, int]:
    rows = settings.num_classes + record.index + 1
    trained = (2 * settings.rank * widths.ffn + rows * widths.hidden) * widths.layers  # the shared expert, too
    return trained, trained


def of_patch_routing(widths: Widths, settings: Any, record: TaskRecord) -> tuple[int, int]:
    rows = settings.num_new + 2 * settings.condition_rank
    trained = (settings.num_new * settings.rank * widths.ffn + rows * widths.hidden) * widths.layers
    return trained, trained


def of_pmoe(widths: Widths, settings: Any, record: TaskRecord) -> tuple[int, int]:
    adapted = widths.deep if record.index else widths.lora  # the shallow adapter is the first task's
    trained = settings.rank * adapted + (record.index + 1) * widths.hidden
    return trained, trained


def of_r2moe(widths: Widths, settings: Any, record: TaskRecord) -> tuple[int, int]:
    expert, rows = settings.rank * widths.ffn, (record.index + 1) * widths.hidden * widths.layers
    kept = len(record.facts["growth"]["new_experts"])
    return expert * widths.layers + rows, expert * kept + rows


def of_cmoe(widths: Widths, settings: Any, record: TaskRecord) -> tuple[int, int]:
    grown = sum(record.facts["growth"]["new_experts"].values())
    experts = settings.experts.num_first * widths.layers + (grown if record.index else 0)  # of two tasks
    trained = grown * settings.experts.rank * widths.ffn + widths.hidden * experts
    return trained, trained


FORMULAS: dict[str, Formula] = dict.fromkeys(TRAINS, of_adapter) | {
    "moelora": of_moelora,
    "inc_moelora": of_inc_moelora,
    "dymoe": of_inc_moelora,
    "moe_adapters": of_moe_adapters,
    "care": of_care,
    "patch_routing": of_patch_routing,
    "pmoe": of_pmoe,
    "r2moe": of_r2moe,
    "cmoe": of_cmoe,
}


@pytest.fixture(params=METHODS)
def lesson(request: pytest.FixtureRequest, lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of(request.param)


@pytest.fixture(params=TRAINS)
def learned(request: pytest.FixtureRequest, lesson_of: Callable[[str], Lesson]) -> Lesson:
    """The same, of the methods that learn at all."""
    return lesson_of(request.param)


def stages_that_learn(lesson: Lesson) -> list[int]:
    return [index for index, stage in enumerate(lesson.run.stages) if stage.learns]


def widths(lesson: Lesson) -> Widths:
    """Of the attention and the FFNs of the language model's two layers."""
    model = load_backbone(lesson.recipe.backbone).model
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in model.model.language_model.named_modules()
        if name.split(".")[-1] in FFN | ATTENTION
    }
    hidden, inner = next(pair for name, pair in linears.items() if name.endswith("up_proj"))
    return Widths(
        lora=sum(map(sum, linears.values())),
        deep=sum(sum(pair) for name, pair in linears.items() if name.startswith("layers.1.")),
        inputs=sum(d_in for d_in, _ in linears.values()),
        hidden=hidden,
        inner=inner,
        layers=2,
    )


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


WITH_EXPERTS = [name for name, kind in KNOWN.items() if TRAINS.get(name, ADAPTER) != ADAPTER]


@pytest.mark.parametrize("method", WITH_EXPERTS)
def test_experts_are_counted_for_every_token_also_where_tokens_share_a_gate(
    method: str, lesson_of: Callable[[str], Lesson]
):
    lesson = lesson_of(method)
    live, prompts = lesson.run.method, lesson.prompts()
    assert live.host is not None
    with torch.no_grad(), live.answering(prompts), live.host.context.observe() as seen:
        live.model(**prompts)
    num_tokens = int(prompts["attention_mask"].sum())
    assert seen.counts and all(counts_E.max() <= num_tokens for counts_E in seen.counts.values())
    most = max(int(counts_E.max()) for counts_E in seen.counts.values())
    assert most > (0 if method == "patch_routing" else len(prompts["input_ids"]))  # there an expert chooses its tokens


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
        method = learned.recipe.method.name
        patterns = TRAINS[method] + ([] if stage else FIRST.get(method, []))
        patterns = [pattern.replace("{stage}", str(stage)) for pattern in patterns]
        assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in names)
        assert all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns)


def test_trainable_parameters_follow_the_closed_formula(learned: Lesson):
    formula, registry = FORMULAS[learned.recipe.method.name], Registry(learned.recipe.run)
    for record in registry.records():
        expected, stored = formula(widths(learned), learned.recipe.method, record)
        assert record.facts["trainable_parameters"] == expected
        assert learned.results.trainable_parameters[record.name] == expected
        tensors = registry.load(record.index)
        trained = [t for group in ("adapter", "experts", "routers") for t in tensors.get(group, {}).values()]
        assert sum(tensor.numel() for tensor in trained if tensor.is_floating_point()) == stored  # the others are ids


@pytest.mark.parametrize("method", [name for name in METHODS if name != "zero_shot"])
def test_every_task_of_a_real_run_is_as_large_as_on_paper(method: str, lesson_of: Callable[[str], Lesson]):
    lesson = lesson_of(method)
    growth = list(lesson.results.growth.values())
    sizes = growth_schedule(lesson.recipe, len(growth), len(growth[-1])).tasks
    for size, record in zip(sizes, lesson.run.registry.records(), strict=True):
        assert size.trained.parameters == record.facts["trainable_parameters"] > 0
        folder = lesson.recipe.run / "tasks" / f"{record.index + 1:02}_{record.name}"
        stored = sum(map(tensor_bytes, folder.glob("*.safetensors")))
        if method == "r2moe":  # stores some integers too, and removes one of its second task's experts
            assert 0.4 * size.stored.bytes < stored <= size.stored.bytes + 100
        elif method in ("moe_adapters", "care"):  # and the ids of what still learns, where they do not just follow
            assert size.stored.bytes <= stored <= size.stored.bytes + 100
        else:
            assert stored == size.stored.bytes


def tensor_bytes(file: Path) -> int:
    """Of the tensors in a file, without the header that names them."""
    with safe_open(file, framework="pt") as tensors:
        return ledger.size_of(tensors.get_tensor(name) for name in tensors.keys()).bytes  # noqa: SIM118


def test_a_gate_that_says_it_is_fixed_is_the_same_for_every_token_and_prompt(lesson: Lesson):
    name, host, seen = lesson.recipe.method.name, lesson.run.method.host, list[Any]()
    if host is None:
        assert name not in FIXED
        return
    hooks = [bank.router.register_forward_hook(lambda *call: seen.append(call[-1])) for bank in host.banks.values()]
    for task in range(len(TASKS)):
        lesson.logits_of(lesson.run.method, task)
    for hook in hooks:
        hook.remove()
    fixed = [gate.gate_BTE for gate in seen if gate is not None and gate.fixed]
    assert all(torch.equal(gate_BTE, gate_BTE[:1, :1].expand_as(gate_BTE)) for gate_BTE in fixed)
    assert bool(fixed) == (name in FIXED)
