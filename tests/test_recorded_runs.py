"""Runs that were recorded before the house was rebuilt come out of it bit for bit, and load in it.

`PYTHONPATH=tests python tests/test_recorded_runs.py` records them again: only where what is learned is meant to change.
On another CPU the last bits of a sum differ, so there tensors are held to a tolerance instead of to their bits.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_model import make_backbone, make_processor

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.evaluation.log import read_results
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.sequence import learn

RECORDED = Path(__file__).parent / "recorded"
METHODS = ("cmoe", "sequential_lora", "moelora")
SINCE = {"cmoe": ("method.probe.router=random",)}
"""What recorded runs did before there was a setting for it."""
TOLERANCE = 1e-5
MEASURED = {"routes", "locator", "growth", "trainable_parameters", "num_samples"}
"""What a results file holds beside names, versions and times."""


def this_cpu() -> str:
    """What decides the order of a sum."""
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.split('+')[0]}"


def learn_beside(folder: Path, backbone: Path, method: str) -> Path:
    """The tiny sequence, learned by relative paths, so that a record holds none of this machine's; returns the run."""
    root = folder / "data"
    if not root.exists():
        tiny.write_data(root)
        shutil.copytree(backbone, folder / "backbone")
    before = Path.cwd()
    os.chdir(folder)
    try:
        learn(tiny.recipe(Path(method) / "run", Path("data"), Path("backbone"), method, *SINCE.get(method, ())))
    finally:
        os.chdir(before)
    return folder / method / "run"


def measured(run: Path) -> dict[str, Any]:
    """What was measured in a run, by the names that it has now."""
    return read_results(run / "results.json").model_dump(include=MEASURED)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture(scope="module", params=METHODS)
def pair(request: pytest.FixtureRequest, workplace: Path, tiny_backbone: Path) -> tuple[Path, Path]:
    """A recorded run, and the same learned now."""
    return RECORDED / request.param, learn_beside(workplace, tiny_backbone, request.param)


def test_what_is_learned_is_what_was_recorded(pair: tuple[Path, Path]):
    recorded, now = pair
    same_cpu = (RECORDED / "cpu.txt").read_text().strip() == this_cpu()
    files = sorted(path.relative_to(recorded) for path in recorded.glob("tasks/*/*.safetensors"))
    assert files == sorted(path.relative_to(now) for path in now.glob("tasks/*/*.safetensors"))
    for name in files:
        if same_cpu:
            assert (recorded / name).read_bytes() == (now / name).read_bytes(), name
        else:
            torch.testing.assert_close(load_file(recorded / name), load_file(now / name), rtol=0, atol=TOLERANCE)


def test_what_is_answered_and_measured_is_what_was_recorded(pair: tuple[Path, Path]):
    recorded, now = pair
    answers = sorted(path.relative_to(recorded) for path in recorded.glob("answers/*/*.jsonl"))
    assert answers and answers == sorted(path.relative_to(now) for path in now.glob("answers/*/*.jsonl"))
    for name in answers:
        lines = [[json.loads(line) for line in (run / name).read_text().splitlines()] for run in pair]
        for old, new in zip(*lines, strict=True):
            assert old.pop("score") == pytest.approx(new.pop("score"), abs=1e-3)
            assert old == new, name
    assert measured(recorded)["routes"] == measured(now)["routes"]
    assert measured(recorded) == measured(now)


def test_a_recorded_run_loads_and_answers_as_the_one_learned_now(
    pair: tuple[Path, Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    recorded, now = pair
    monkeypatch.chdir(workplace)
    logits = []
    for run in (recorded, now):
        registry = Registry(run)
        recipe = registry.recipe()
        method = restore_method(recipe, load_backbone(recipe.backbone), registry)
        ids_BT = torch.tensor([[1, 40, 50, 60]])
        batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        with torch.no_grad(), method.answering(batch, torch.tensor([1])):
            logits.append(method.model(**batch).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=TOLERANCE)


def record() -> None:
    """Write `recorded/` anew."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_backbone(place / "tiny", make_processor())
        for method in METHODS:
            run = learn_beside(place, place / "tiny", method)
            shutil.rmtree(RECORDED / method, ignore_errors=True)
            for kept in ("run.json", "results.json", "tasks", "answers"):
                source, target = run / kept, RECORDED / method / kept
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (RECORDED / "cpu.txt").write_text(this_cpu() + "\n")


if __name__ == "__main__":
    record()
