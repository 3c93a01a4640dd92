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


def speed(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit status of the script."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(left.value.code or 0)


def test_routes_are_measured_against_oracle_and_batches_against_single_prompts(
    lesson_of: Callable[[str], Lesson],
    tiny_data: Path,
    tiny_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    settings = ("experts.first_layer=1", "locator.free=true", "locator.layer=1", "locator.epochs=2")
    small = ("data.train_rows=8", "data.eval_rows=1", *(f"method.{setting}" for setting in settings))
    free = tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "cmoe", *small)
    sequence.learn(free)
    before = lesson_of("cmoe").recipe
    for recipe, others, first in ((free, {"free", "twice"}, 1), (before, {"located"}, 0)):
        out = tmp_path / "new" / f"speed_{first}.json"
        assert speed(monkeypatch, "run", recipe.run, "--batch-size", 3, "--turns", 2, "--out", out) == 0
        found = json.loads(out.read_text())
        assert found["ratio_to_oracle"].keys() == found["seconds"].keys() == {"oracle", *others}
        assert found["ratio_to_oracle"]["oracle"] == 1 and min(found["seconds"].values()) > 0
        assert (found["batch"][0], found["tasks"], found["first_layer"], found["llm_layers"]) == (3, 2, first, 2)
    assert found["answers_a_second"].keys() == {"batch", "single"} and found["batch_to_single"] > 0
    assert found["threads"] >= 1 and found["versions"]["torch"] and len(found["base"]) == 64


def test_a_run_that_locates_nothing_is_refused(
    lesson_of: Callable[[str], Lesson], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    out = tmp_path / "speed.json"
    assert speed(monkeypatch, "run", lesson_of("sequential_lora").recipe.run, "--out", out) == 2
    assert "its method locates nothing" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not out.exists()


def test_variants_are_measured_without_a_run_and_ratios_follow_them(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    out = tmp_path / "steps.json"
    words = ("--model", tiny_backbone, "--device", "cpu", "--turns", 2, "--tokens", 4, "--out", out)
    assert speed(monkeypatch, "steps", *words, "--variants", "lora_64,cmoe_8,cmoe_64") == 0
    found = json.loads(out.read_text())
    assert found["costs"].keys() == {"lora_64", "cmoe_8", "cmoe_64"}
    assert (found["device"], found["weights"]) == ("cpu", "random") and found["load"]["row_tokens"] == 4 + 4
    assert found["ratios"].keys() == {"8 experts, 6 frozen / LoRA of their total rank"}
    assert "(at most 1.00)" in capsys.readouterr().out
    assert speed(monkeypatch, "steps", *words, "--variants", "lora_9") == 2
    assert "lora_9; there are lora_16" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_cost_is_measured_against_the_number_of_tasks(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "tasks.json"
    words = ("--model", tiny_backbone, "--device", "cpu", "--turns", 2, "--tokens", 4, "--batch-size", 2)
    assert speed(monkeypatch, "tasks", *words, "--out", out) == 0
    found = json.loads(out.read_text())
    assert list(found["costs"]) == list(found["to_one_task"]) == ["1", "8", "32", "100", "300"]
    assert found["to_one_task"]["1"]["decoding"]["median"] == 1
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "steps", "--device", "cuda"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert left.value.code == 2 and "torch sees no GPU" in capsys.readouterr().err
