"""The command states what a recipe would cost, in tables and as JSON, and loads and writes nothing else."""

import json
import re
from pathlib import Path

import pytest
from commands import refused, type_in

from llava_cmoe.planning.estimate import Budget
from llava_cmoe.planning.memory import Memory

REPOSITORY = Path(__file__).parents[2]
POCKET = REPOSITORY / "train/recipes/pocket_cmoe_paper.yaml"  # experts on FFNs alone: six sites of one size
SHORT = ("training.batch_size=1", "--length", 60)


def test_the_command_shows_what_it_writes(tmp_path: Path):
    out = tmp_path / "budget.json"
    result = type_in("plan", POCKET, *SHORT, "--layers", 4, "--gpus", 1, "--gpus", 2, "--json", out)
    assert result.exit_code == 0, result.output
    found = Budget.model_validate_json(out.read_bytes())
    assert json.loads(out.read_bytes())["needs"][0]["memory"]["backbone"].keys() == {"none", "8bit", "nf4"}
    assert (found.method, len(found.expert_parameters), found.hours) == ("cmoe", 6, None)
    assert set(found.expert_parameters.values()) == {26 * 3 * (224 + 640)}
    assert [(schedule.num_grown, len(schedule.tasks)) for schedule in found.growth_schedules] == [(4, 8), (6, 8)]
    expert = 26 * 3 * (224 + 640)
    last = found.growth_schedules[0].tasks[-1]
    assert last.trained.parameters == 2 * 4 * expert + (2 * 6 + 2 * 4 * 7) * 224
    assert f"{last.trained.parameters:,}" in result.output
    assert {(need.fit, need.num_gpus) for need in found.needs} == {
        (fit, count)
        for fit in ("training, first task", "probing, last task", "training, last task")
        for count in (1, 2)
    }
    probing = next(need for need in found.needs if need.fit == "probing, last task")
    assert probing.memory.pool == 4 * sum(task.trained.parameters for task in found.growth_schedules[0].tasks[:-1])
    assert probing.memory.trained == 4 * (2 * 6 * expert + 224 * (2 * 6 * 2 + 2 * 4 * 6))
    training = next(need for need in found.needs if need.fit == "training, last task")
    assert (probing.batch_size, training.batch_size) == (4, 1)  # probing has a batch of its own in this recipe
    assert training.memory.trained == 4 * last.trained.parameters
    assert training.activations.kept < probing.activations.kept < 4 * training.activations.kept


def test_of_a_method_that_does_not_grow_every_task_costs_the_same(tmp_path: Path):
    out = tmp_path / "budget.json"
    recipe = REPOSITORY / "train/recipes/pocket_sequential_lora.yaml"
    result = type_in("plan", recipe, *SHORT, "--json", out)
    assert result.exit_code == 0, result.output
    found = Budget.model_validate_json(out.read_bytes())
    assert {need.fit for need in found.needs} == {"training, every task"}
    assert found.growth_schedules[0].mean == 32 * 6 * (4 * 2 * 224 + 3 * (224 + 640))


def test_precisions_and_the_optimizer_of_the_recipe_enter(tmp_path: Path):
    def last_task(*words: str) -> dict[str, Memory]:
        assert type_in("plan", POCKET, *SHORT, *words, "--gpus", 1, "--json", tmp_path / "plan.json").exit_code == 0
        needs = Budget.model_validate_json((tmp_path / "plan.json").read_bytes()).needs
        return {need.strategy: need.memory for need in needs if need.fit == "training, last task"}

    wide = last_task()
    narrow = last_task("backbone.dtype=bfloat16", "method.experts.dtype=bfloat16", "training.optimizer=adamw_bnb_8bit")
    for strategy, memory in wide.items():
        assert (narrow[strategy].states("none") is None) == strategy.startswith("ZeRO")
        assert memory.states("none") is not None
    full, half = wide["none or DDP"], narrow["none or DDP"]
    assert full.backbone["none"] == 2 * (half.backbone["none"] or 0)
    for whole, part in ((full.pool, half.pool), (full.trained, half.trained), (full.gradients, half.gradients)):
        assert whole / 2 < part < 0.52 * whole  # all but routers
    assert (full.optimizer / full.trained, half.optimizer / full.trained) == (2, pytest.approx(65 / 128, abs=1e-5))


def test_hours_are_all_samples_by_the_throughput(tmp_path: Path):
    out = tmp_path / "budget.json"
    words = ("training.epochs=2", "method.probe.fraction=0.5", "method.probe.holdout=0.5", "data.tasks=[gqa, vizwiz]")
    result = type_in("plan", POCKET, *SHORT, *words, "--rows", 1000, "--throughput", 0.5, "--json", out)
    assert result.exit_code == 0, result.output
    found = Budget.model_validate_json(out.read_bytes())
    assert found.samples == 2 * 2 * 1000 + 250 and found.hours == pytest.approx(4250 / 0.5 / 3600)


def test_a_folder_with_nothing_but_a_config_is_enough(tmp_path: Path):
    config = REPOSITORY / "llava_cmoe/pocket/weights/config.json"
    (tmp_path / "config.json").write_text(config.read_text())
    recipe = REPOSITORY / "train/recipes/pocket_sequential_lora.yaml"
    assert type_in("plan", recipe, *SHORT, f"backbone.path={tmp_path}").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", 7), "--layers 7: 6 sites may grow; give 0 to 6"),
        (("backbone.path=nobody/no-such-model",), "a name that is known here: llava-hf/llava-1.5-7b-hf"),
        (("--throughput", 1, "data.root=/no/such/root"), "/no/such/root does not exist.*give --rows"),
        (("method={name: zero_shot}",), "zero_shot learns nothing"),
        (("method.experts.also_in=[vision]", "--length", 48), "48 tokens are too few for a picture, which takes 49"),
    ],
)
def test_a_mistake_is_named(words: tuple[object, ...], message: str):
    assert re.search(message, refused("plan", POCKET, *SHORT, *words))
