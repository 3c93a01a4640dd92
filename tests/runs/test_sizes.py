"""A task of too few rows is refused before the first stage, and one that is not refused is learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe import sequence
from llava_cmoe.data.problems import DataError
from llava_cmoe.locators.prototype import PrototypeLocator
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.recipes import parse_recipe

LEARNING = [name for name in tiny.METHODS if name != "zero_shot"]
LOCATING = [
    name
    for name in LEARNING
    if hasattr(parse_recipe({"run": "x", "method": {"name": name}}, source="test").method, "locator")
]


@pytest.mark.parametrize(("method", "num_rows"), [*((name, 1) for name in LEARNING), *((name, 2) for name in LOCATING)])
def test_a_small_task_is_learned_or_refused_before_the_first_step(
    method: str, num_rows: int, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_data(tmp_path)
    file = tmp_path / "Instructions_Original/sides/train.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:num_rows]))
    more = ["method.locator.epochs=2"] if method in LOCATING else []
    recipe = tiny.recipe(
        tmp_path / "run", tmp_path, tiny_backbone, method, "evaluation.routes=[located]", "data.eval_rows=1", *more
    )
    try:
        sequence.learn(recipe)
    except DataError as error:
        assert method in LOCATING and num_rows < 3
        assert error.problem.file == file and "to learn" in str(error) and "locator.holdout" in str(error)
        assert not recipe.run.exists()
    else:
        assert len(Registry(recipe.run).records()) == (1 if method == "joint" else 2)


@given(num_rows=st.integers(1, 400), holdout=st.floats(0.01, 0.99))
def test_what_is_not_refused_leaves_something_to_fit(num_rows: int, holdout: float) -> None:
    """By the numbers that a locator counts with, of any method that has one."""
    for name in ("cmoe", "lora_per_task"):
        settings: dict[str, Any] = {"name": name, "locator": {"holdout": holdout, "kind": "prototype"}}
        method = parse_recipe({"run": "x", "method": settings}, source="test").method
        locator = PrototypeLocator(method.locator)
        features = torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(0))
        if method.why_too_few(num_rows, first=False) is None:
            assert locator.fit(features, seed=0)
        else:
            with pytest.raises(ValueError, match="at least 3 features"):
                locator.fit(features, seed=0)
