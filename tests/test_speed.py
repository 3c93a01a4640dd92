"""What is measured of locating is measured on a run that locates in passing, and says with what."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
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


def test_without_a_run_experts_are_measured_beside_plain_lora(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    words = ["--device", "cpu", "--model", str(tiny_backbone), "--random-weights", "--tokens", "4", "--experts", "2"]
    sizes = ["--batch-size", "2", "--repetitions", "1", "--out", str(tmp_path / "pace.json")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words, *sizes])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not left.value.code
    found = json.loads((tmp_path / "pace.json").read_text())
    assert found["paces"].keys() == {"lora", "cmoe"} and found["device"] == "cpu" and found["weights"] == "random"
    shown = capsys.readouterr().out
    assert "lora: " in shown and "cmoe: " in shown and "learning_time" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cuda"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert left.value.code == 2 and "torch sees no GPU" in capsys.readouterr().err
