"""What is measured of locating is measured on a run that locates in passing, and says with what."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from tiny import Lesson

from llava_cmoe import sequence

SCRIPT = Path(__file__).parents[1] / "eval" / "speed.py"


def measure(run: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of the script."""
    words = [str(SCRIPT), str(run), "--batch-size", "3", "--repetitions", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(left.value.code or 0)


def test_three_routes_are_measured_against_oracle(
    tiny_data: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = ("experts.first_layer=1", "locator.free=true", "locator.layer=1", "locator.epochs=2")
    small = ("data.train_rows=8", "data.eval_rows=1", *(f"method.{setting}" for setting in settings))
    recipe = tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "cmoe", *small)
    sequence.learn(recipe)
    assert measure(recipe.run, tmp_path / "new" / "speed.json", monkeypatch) == 0
    found = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert found["ratio_to_oracle"].keys() == found["seconds"].keys() == {"oracle", "free", "twice"}
    assert found["ratio_to_oracle"]["oracle"] == 1 and min(found["seconds"].values()) > 0
    assert (found["batch"][0], found["tasks"], found["first_layer"], found["llm_layers"]) == (3, 2, 1, 2)
    assert found["threads"] >= 1 and found["versions"]["torch"] and len(found["base"]) == 64


def test_a_run_that_locates_beforehand_is_refused(
    lesson_of: Callable[[str], Lesson], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    assert measure(lesson_of("cmoe").recipe.run, tmp_path / "speed.json", monkeypatch) == 2
    assert "method.locator.free is off" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "speed.json").exists()
