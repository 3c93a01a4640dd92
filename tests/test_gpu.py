"""A run on a GPU grows and answers as one on the CPU does, also with weights in four bits and with checkpointing.

Sums run in another order on a GPU, so nothing is compared bit for bit: frequencies while probing may differ by 0.02,
losses by 2 percent (5 where products are in bfloat16), and one answer in ten.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Lesson

from llava_cmoe.evaluation.log import read_answers
from llava_cmoe.registry.schema import TaskRecord
from llava_cmoe.registry.store import Registry

TESTS = Path(__file__).parent
Learned = tuple[Path, tuple[TaskRecord, ...]]
pytestmark = pytest.mark.gpu


@pytest.fixture
def learn(sees_gpu: dict[str, str], tmp_path: Path, tiny_data: Path, tiny_backbone: Path) -> Callable[..., Learned]:
    """Learn the tiny sequence in a process that sees the GPU, or go on there."""

    def learned(place: str, *overrides: str) -> Learned:
        recipe = tiny.recipe(tmp_path / place / "run", tiny_data, tiny_backbone, "cmoe", *overrides)
        command = [sys.executable, str(TESTS / "launched.py"), recipe.model_dump_json()]
        subprocess.run(command, env=sees_gpu, cwd=TESTS.parent, check=True)
        return recipe.run, Registry(recipe.run).records()

    return learned


def grown(records: tuple[TaskRecord, ...]) -> list[dict[str, int]]:
    return [record.facts["growth"]["new_experts"] for record in records]


def losses(records: tuple[TaskRecord, ...]) -> list[float]:
    return [record.facts["training"][when] for record in records for when in ("first_loss", "last_loss")]


def answers(run: Path) -> dict[tuple[str, str], tuple[str, int | None]]:
    """Text and located task of every answer, by file and id."""
    files = sorted((run / "answers").rglob("*.jsonl"))
    return {
        (str(file.relative_to(run)), answer.id): (answer.text, answer.located)
        for file in files
        for answer in read_answers(file)
    }


def assert_alike(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    assert sum(one[key] == other[key] for key in one) >= 0.9 * len(one)


def test_a_run_grows_and_answers_as_on_the_cpu(learn: Callable[..., Learned], lesson_of: Callable[[str], Lesson]):
    run, records = learn("gpu")
    cpu = lesson_of("cmoe").recipe.run
    expected = Registry(cpu).records()
    assert grown(records) == grown(expected)
    for site, used in expected[1].facts["growth"]["frequencies"].items():
        assert records[1].facts["growth"]["frequencies"][site] == pytest.approx(used, abs=0.02)
    assert losses(records) == pytest.approx(losses(expected), rel=0.02)
    assert_alike(answers(run), answers(cpu))


def test_four_bits_and_bfloat16_learn_and_come_back(learn: Callable[..., Learned]):
    halves = ("backbone.quantization=nf4", "backbone.dtype=bfloat16", "training.precision=bf16")
    run, records = learn("gpu", *halves, "training.optimizer=paged_adamw_8bit")
    assert all(record.facts["training"]["last_loss"] < record.facts["training"]["first_loss"] for record in records)
    before = answers(run)
    for file in (run / "answers" / "after_02").iterdir():
        file.unlink()
    learn("gpu", *halves, "training.optimizer=paged_adamw_8bit")  # restores all and asks again
    assert answers(run) == before


def test_checkpointing_learns_the_same(learn: Callable[..., Learned]):
    half = "training.precision=bf16"
    (_, plain), (_, checkpointed) = learn("plain", half), learn("less", half, "training.gradient_checkpointing=true")
    assert grown(checkpointed) == grown(plain)
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=0.05)


def test_speed_tells_the_memory(sees_gpu: dict[str, str], tmp_path: Path):
    words = ["--model", "pocket", "--checkpointing", "--turns", "2", "--variants", "lora_16,cmoe_8"]
    command = [sys.executable, "eval/speed.py", "steps", "--device", "cuda", *words]
    subprocess.run([*command, "--out", str(tmp_path / "steps.json")], env=sees_gpu, cwd=TESTS.parent, check=True)
    costs = json.loads((tmp_path / "steps.json").read_text())["costs"]
    assert all(cost["bytes_more"] > 4 * cost["trained_parameters"] for cost in costs.values())  # gradients
