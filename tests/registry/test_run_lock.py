"""One process writes to a run; another is refused in one line before a model loads, and a dead one holds nothing."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

from llava_cmoe import sequence
from llava_cmoe.registry.run_lock import hold, writing
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry

HOLDER = """
import sys, time
from pathlib import Path
from llava_cmoe.registry.store import Registry
registry = Registry(Path(sys.argv[1]), writer=True)
registry.claim()
if sys.argv[2] == "worker":  # as a data loader's, which outlives a killed run by some seconds
    import os
    if os.fork() == 0:
        time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that holds a run folder."""
    started: list[subprocess.Popen[str]] = []

    def begin(run: Path, kind: str = "alone") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(run), kind], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield begin
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


@pytest.mark.parametrize("fresh", [True, False])
def test_a_second_writer_is_refused_before_the_model_loads_and_touches_nothing(
    start: Start, tiny_data: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    recipe = tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "sequential_lora")
    if not fresh:
        Registry(recipe.run, writer=True).open_run(recipe)
        gc.collect()
    start(recipe.run)
    half = recipe.run / "tasks/.01_colours.partial"
    half.mkdir(parents=True)
    monkeypatch.setattr("llava_cmoe.runs.run.load_backbone", lambda *_: pytest.fail("loaded"))
    with pytest.raises(RegistryError, match=r"run: another process is writing to this run .*; wait .*run="):
        sequence.learn(recipe)
    assert half.exists()
    assert Registry(recipe.run).records() == ()  # readers are not refused


@pytest.mark.parametrize("kind", ["alone", "worker"])
def test_a_killed_writer_holds_nothing(start: Start, tmp_path: Path, kind: str) -> None:
    """Neither does a process that it forked, and that outlives it."""
    first = start(tmp_path, kind)
    with pytest.raises(RegistryError, match="is writing to this run"):
        hold(tmp_path)
    first.kill()
    first.wait()
    registry = Registry(tmp_path, writer=True)
    assert registry._lock is not None


def test_the_same_process_may_open_a_run_again_and_lets_go_of_it(tmp_path: Path) -> None:
    first, second = Registry(tmp_path, writer=True), Registry(tmp_path, writer=True)
    assert first._lock is second._lock
    del first
    gc.collect()
    assert not free(tmp_path)
    del second
    gc.collect()
    assert free(tmp_path)


def test_writing_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    with writing(tmp_path):
        assert not free(tmp_path)
    assert free(tmp_path)
    with writing(tmp_path, main=False):
        assert free(tmp_path)


def free(run: Path) -> bool:
    """Whether another process could hold the folder."""
    script = (
        "import sys; from pathlib import Path; from llava_cmoe.registry.run_lock import hold; hold(Path(sys.argv[1]))"
    )
    return subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, check=False).returncode == 0
