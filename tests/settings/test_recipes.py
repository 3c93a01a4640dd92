"""A recipe is read whole or refused with the key, or the override, to mend."""

from pathlib import Path

import pytest

from llava_cmoe.data.task_data import sequence_of
from llava_cmoe.settings import base
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.recipes import load_recipe, shipped

RECIPES = sorted(shipped("train/recipes").glob("*.yaml"))
COIN = [path for path in RECIPES if path.stem.startswith("coin_")]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("run: runs/x\nmethod: {name: cmoe}\n")
    return path


def test_an_override_is_yaml(recipe: Path):
    made = load_recipe(recipe, ["data.tasks=[gqa, vizwiz]", "data.eval_rows=null", "method.probe.alpha=1e-1"])
    assert (made.data.tasks, made.data.eval_rows, made.method.probe.alpha) == (("gqa", "vizwiz"), None, 0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': write it as dotted.key=value"),
        ("data.tasks=[gqa", "override 'data.tasks=[gqa': .*not valid YAML"),
        ("run=a: b: c", "override 'run=a: b: c': .*not valid YAML"),
        ("run=\x07", "override .*not valid YAML"),
        ("seed.x=1", "override seed.x: seed is not a group of settings"),
        ("method.probe.alpha=-1", "method.probe.alpha: .*greater than or equal to 0"),
        ("backbone.attention=flash_attention_2", "backbone: .*computes in 16 bits, dtype is float32; set dtype"),
        ("training.report_to=[mail]", "training.report_to.0: .*'tensorboard', 'wandb', 'mlflow' or 'trackio', got"),
        ("evaluation.routes=[]", "evaluation.routes: .*at least 1 item"),
        ("method={name: moelora, rank: 100}", "method: .*rank 100 cannot be split evenly over 8 experts"),
        ("method.experts.also_in=[audio]", "method.experts.also_in.0: .*'vision' or 'projector', got 'audio'"),
        ("method.experts.also_in=[vision, vision]", "method.experts: .*also_in names a place twice: vision, vision"),
    ],
)
def test_an_override_that_cannot_be_used_is_named(recipe: Path, override: str, message: str):
    recipe.write_text("run: runs/x\nseed: 0\nmethod: {name: cmoe}\n")
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        load_recipe(recipe, [override])


def test_the_old_name_of_a_setting_still_loads_and_the_new_one_is_named_once(
    recipe: Path, caplog: pytest.LogCaptureFixture
):
    base._say_once.cache_clear()
    made = [load_recipe(recipe, ["method.experts.head_start=2.5"]) for _ in range(2)]
    assert made[0] == made[1] == load_recipe(recipe, ["method.experts.router_init_logit=2.5"])
    assert made[0].method.experts.router_init_logit == 2.5
    assert "head_start" not in made[0].model_dump_json()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "head_start" in caplog.text and "router_init_logit" in caplog.text


def test_both_names_of_a_setting_are_refused(recipe: Path):
    both = ["method.experts.head_start=2", "method.experts.router_init_logit=2"]
    with pytest.raises(RecipeError, match="method.experts: head_start is the old name of router_init_logit; give one"):
        load_recipe(recipe, both)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_whole_and_names_its_run_after_itself(path: Path):
    recipe = load_recipe(path)
    assert recipe.run == Path("runs") / path.stem
    assert len(sequence_of(recipe.data).tasks) == 8


@pytest.mark.parametrize("path", COIN, ids=lambda path: path.stem)
def test_a_recipe_of_coin_trains_as_coin_does(path: Path):
    recipe = load_recipe(path)
    training = recipe.training
    assert (training.learning_rate, training.warmup, training.epochs) == (2e-4, 0.03, 1)
    assert (training.precision, training.max_length, recipe.backbone.dtype) == ("bf16", 2048, "bfloat16")
    assert training.batch_size * training.accumulation * 8 == 128
    method = recipe.method.experts if recipe.method.name == "cmoe" else recipe.method
    assert method.alpha / method.rank == 2
    assert recipe.method.name == "cmoe" or method.rank == 128


def test_recipes_of_coin_differ_in_method_or_base_alone():
    bases = {path.stem: load_recipe(path).backbone.path for path in COIN}
    assert bases.pop("coin_cmoe_llava_7b") == "llava-hf/llava-1.5-7b-hf"
    assert len(set(bases.values())) == 1 and len(bases) == 3
    ours, other = (load_recipe(path) for path in COIN if "cmoe" in path.stem)
    same = {"run": None, "backbone": None}
    assert ours.model_dump() | same == other.model_dump() | same
