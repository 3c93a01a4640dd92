"""A study learns its runs in processes of their own; whatever stops it, the same command finishes it."""

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from commands import type_in
from tiny import files_of

from llava_cmoe.evaluation.log import read_results
from llava_cmoe.report.studies import read_study, study_markdown
from llava_cmoe.studies.jobs import learn_all, slots
from llava_cmoe.studies.plan import PlannedRun, plan_studies

FOLDER = Path("runs/studies/where")
GOOD = {"everywhere": ["method.probe.scope=all"], "nowhere": ["method.probe.scope=none"]}


class Notes:
    """Writes down how it is called; `interrupt` is Ctrl-C once a run is at work."""

    def __init__(self, interrupt: bool = False) -> None:
        self.interrupt, self.ends = interrupt, list[tuple[str, str | None]]()

    def moved(self, done: float, working: Sequence[str]) -> None:
        if self.interrupt and working:
            raise KeyboardInterrupt

    def ended(self, name: str, seconds: float, failure: str | None) -> None:
        self.ends.append((name, failure))


@pytest.fixture
def study(tmp_path: Path, tiny_data: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study file in an otherwise empty folder, from where commands are typed."""
    monkeypatch.chdir(tmp_path)
    tiny.recipe(tmp_path / "unused", tiny_data, tiny_backbone)
    return write(tmp_path / "study.yaml", GOOD)


def write(path: Path, variants: dict[str, list[str]]) -> Path:
    path.write_text(yaml.safe_dump({"name": "where", "recipe": "recipe.yaml", "variants": variants}, sort_keys=False))
    return path


def runs_of(study: Path) -> tuple[PlannedRun, ...]:
    [plan] = plan_studies([study], Path("runs/studies"))
    return plan.runs


def test_a_study_survives_a_failing_run_and_an_interruption_and_is_then_only_read(study: Path, monkeypatch):
    children, popen = list[subprocess.Popen[bytes]](), subprocess.Popen
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(
            subprocess, "Popen", lambda *words, **rest: children.append(popen(*words, **rest)) or children[-1]
        )
        learn_all(runs_of(study), slots(1, 1), Notes(interrupt=True))
    assert [child.poll() for child in children] == [-signal.SIGTERM]

    result = type_in("study", write(study, {"broken": ["backbone.path=no/such/model"]} | GOOD), "--jobs", 2)
    assert result.exit_code == 1, result.output
    assert re.search(
        r"where/broken_0: failed .*status 2.*broken_0.log ends:\n.*backbone.path", result.output, re.DOTALL
    )
    assert "no table, not all runs are finished" in result.output and not (FOLDER / "study.json").exists()
    learned = {variant: files_of(FOLDER / f"{variant}_0" / "tasks") for variant in GOOD}
    results = {variant: read_results(FOLDER / f"{variant}_0" / "results.json") for variant in GOOD}
    assert all(found.finished and found.threads == max(1, cores() // 2) for found in results.values())

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a finished run was started"))
    for _ in range(2):
        result = type_in("study", write(study, GOOD))
        assert result.exit_code == 0, result.output
    assert {variant: files_of(FOLDER / f"{variant}_0" / "tasks") for variant in GOOD} == learned
    assert "2 of 2" in type_in("study", study, "--dry-run").output

    summary = read_study(FOLDER / "study.json")
    assert list(summary.variants) == list(GOOD) and summary.base == results["nowhere"].base
    grown = {variant: found.numbers["share_grown"].mean for variant, found in summary.variants.items()}
    assert grown == {"everywhere": 100.0, "nowhere": 0.0}
    for variant, found in summary.variants.items():
        assert found.numbers["last"].values == (results[variant].headline.metrics["last"],)
        assert found.results[0]["run"] == f"{variant}_0" and "located_minus_random" in found.numbers
    assert (FOLDER / "table.md").read_text() == f"{study_markdown(summary)}\n"
    assert (FOLDER / "table.md").read_text() in result.output and (FOLDER / "last.png").stat().st_size > 0


def test_sigterm_ends_the_processes_even_one_that_is_just_being_started(study: Path, monkeypatch):
    children, popen = list[subprocess.Popen[bytes]](), subprocess.Popen

    def start(_: list[str], **rest: Any) -> subprocess.Popen[bytes]:
        children.append(popen(["sleep", "60"], **rest))
        os.kill(os.getpid(), signal.SIGTERM)
        return children[-1]

    def not_heeded(*_: object) -> None:
        pytest.fail("SIGTERM would have killed the study")

    monkeypatch.setattr(subprocess, "Popen", start)
    before = signal.signal(signal.SIGTERM, not_heeded)
    try:
        result = type_in("study", study, "--jobs", 2)
        assert signal.getsignal(signal.SIGTERM) is not_heeded
    finally:
        signal.signal(signal.SIGTERM, before)
        ended = [child.poll() for child in children]
        for child in children:
            child.kill()
    assert result.exit_code == 128 + signal.SIGTERM and "failed" not in result.output
    assert len(ended) == 2 and set(ended) == {-signal.SIGTERM}


def test_finished_runs_that_cannot_stand_in_one_table_are_refused_by_name(study: Path, lesson_of):
    for run, base in zip(runs_of(study), ("one", "two"), strict=True):
        run.recipe.run.mkdir(parents=True)
        results = lesson_of("cmoe").results.model_copy(update={"run": run.recipe.run.name, "base": base})
        (run.recipe.run / "results.json").write_text(results.model_dump_json())
    result = type_in("study", study)
    assert result.exit_code == 2 and "runs everywhere_0 and nowhere_0 differ in base" in result.output


def cores() -> int:
    return len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("jobs", "num_runs", "threads"), [(None, 99, 1), (1, 99, cores()), (99, 1, cores()), (2 * cores(), 99, 1)]
)
def test_cores_are_shared_by_the_runs_at_work(jobs: int | None, num_runs: int, threads: int, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    shares = slots(jobs, num_runs)
    assert len(shares) == min(jobs or cores(), num_runs)
    assert all(share == {"OMP_NUM_THREADS": str(threads)} for share in shares)


def test_each_run_sees_one_of_the_gpus_that_the_study_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in slots(None, 9)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in slots(3, 9)] == ["5", "7", "5"]


def test_a_run_that_differs_in_the_locator_waits_for_its_experts_and_trains_none(study: Path):
    variants = {"vae": [], "gaussian": ["method.locator.kind=gaussian"]}
    result = type_in("study", write(study, variants), "--jobs", 2)
    assert result.exit_code == 0, result.output
    vae, *others = (read_results(FOLDER / f"{variant}_0" / "results.json") for variant in variants)
    for run, other in zip(runs_of(study)[1:], others, strict=True):
        assert f"--experts {FOLDER / 'vae_0'}" in run.log.read_text()
        assert "training" not in run.log.read_text().partition("--experts")[2]
        assert other.routes["oracle"] == vae.routes["oracle"] and other.recipe != vae.recipe


def test_experts_of_a_run_that_failed_are_learned_where_they_are_needed(study: Path):
    write(study, {"broken": [], "good": ["method.locator.kind=gaussian"]})
    broken, good = runs_of(study)
    broken.recipe.run.mkdir(parents=True)
    (broken.recipe.run / "tasks").write_text("in the way")
    notes = Notes()
    assert learn_all([broken, good], slots(2, 2), notes) == [broken]
    assert "--experts" not in good.log.read_text() and good.results() is not None
