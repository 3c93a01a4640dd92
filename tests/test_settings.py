"""A recipe is read whole or refused with the key, or the override, to mend."""

from pathlib import Path

import pytest

from llava_cmoe.settings import RecipeError, load_recipe


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
        ("method.experts.also_in=[audio]", "method.experts.also_in.0: .*'vision' or 'projector', got 'audio'"),
        ("method.experts.also_in=[vision, vision]", "method.experts: .*also_in names a place twice: vision, vision"),
    ],
)
def test_an_override_that_cannot_be_used_is_named(recipe: Path, override: str, message: str):
    recipe.write_text("run: runs/x\nseed: 0\nmethod: {name: cmoe}\n")
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        load_recipe(recipe, [override])
