"""The demo learns the pocket sequence by the shipped recipes; whatever stops it, the same call finishes it."""

from pathlib import Path

import pytest
from tiny import files_of

from llava_cmoe.cli import pocket_demo as demo
from llava_cmoe.settings.recipes import load_recipe, shipped


def test_a_killed_demo_goes_on_and_a_finished_one_is_only_read(tiny_backbone: Path, tmp_path: Path, monkeypatch):
    size = demo.DemoSize(train_rows=4, test_rows=1, epochs=1)
    overrides = [f"backbone.path={tiny_backbone}", "data.tasks=[imagenet, gqa]", "training.precision=float32"]
    told: set[str] = set()

    def call() -> dict[str, demo.Results]:
        return demo.run_demo(tmp_path, lambda where, *_: told.add(where), size, overrides)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "draw_matrices", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call()
    assert not (tmp_path / "results.json").exists()
    learned = {name: files_of(tmp_path / name / "tasks") for name in demo.RECIPES}
    both = call()
    assert {name: files_of(tmp_path / name / "tasks") for name in demo.RECIPES} == learned
    assert list(both) == ["sequential_lora", "lora_per_task", "cmoe"] and (tmp_path / "matrix.png").stat().st_size > 0
    assert all(results.tasks == ("imagenet", "gqa") and results.num_samples["gqa"] == 1 for results in both.values())
    assert {"rendering", "sequential_lora 1/2 imagenet", "cmoe 2/2 gqa"} <= told

    monkeypatch.setattr(demo, "learn", lambda *_: pytest.fail("a finished demo learned"))
    assert call() == both


def test_the_demo_differs_from_the_shipped_recipe_only_in_its_folder_and_size(tmp_path: Path):
    size = demo.DemoSize()
    for name, path in demo.RECIPES.items():
        shipped_one, made = load_recipe(shipped(path)).model_dump(), demo.demo_recipe(name, tmp_path, size).model_dump()
        assert made["method"] == shipped_one["method"] and made["backbone"] == shipped_one["backbone"]
        assert made["data"] == shipped_one["data"] | {"root": tmp_path / "data"}
        assert made["training"] == shipped_one["training"] | {"epochs": size.epochs}
