"""A command that is told to stop ends in one line and with the status of its signal, and writes nothing half."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import typer
from commands import type_in

from llava_cmoe import cli
from llava_cmoe.cli.console import user_errors
from llava_cmoe.training.stage import StageTrainer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="only the main thread gets signals"
)


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Signals as a shell's foreground command has them: whoever started the tests may ignore some, as `nohup` does."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_any_command_ends_in_one_line(number: signal.Signals, capsys: pytest.CaptureFixture[str]):
    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(typer.Exit) as left, user_errors():
        os.kill(os.getpid(), number)
        raise AssertionError("nobody heeded it")
    assert left.value.exit_code == 128 + number
    out, told = capsys.readouterr()
    assert out == "" and told.count("\n") == 1 and told.startswith(f"stopped by {number.name}: ")
    assert [signal.getsignal(one) for one in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_while_the_command_line_is_read_is_one_line_too(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def reading(*_: object, **words: object) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("nobody heeded it")

    monkeypatch.setattr(cli, "app", reading)
    with pytest.raises(SystemExit) as left:
        cli.main("methods")
    told = capsys.readouterr().err
    assert left.value.code == 128 + number and told.startswith(f"stopped by {number.name}: ") and told.count("\n") == 1


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with user_errors():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_helper_dies_of_its_signal_as_it_would_have():
    with user_errors():
        if not (child := os.fork()):
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_training_ends_in_one_line_and_leaves_nothing_half(
    number: signal.Signals, tiny_data: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "sequential_lora")
    step, steps = StageTrainer.training_step, list[int]()

    def stopped(*args: object, **kwargs: object) -> object:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        return step(*args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", stopped)
    result = type_in("train", tmp_path / "recipe.yaml")
    assert result.exit_code == 128 + number and len(steps) == 3 and isinstance(result.exception, SystemExit)
    told = result.output.splitlines()
    assert told[-1].startswith(f"stopped by {number.name}: ") and "Traceback" not in result.output
    left = {str(path.relative_to(recipe.run)) for path in recipe.run.rglob("*") if path.is_file()}
    shown = {"progress.html", "progress.json"}
    assert left - {path for path in left if path.startswith("logs/")} == {"run.json", ".lock"} | shown
    page = (recipe.run / "progress.html").read_text()
    assert "stopped in stage 1 of 2" in page and page.endswith("</html>")
