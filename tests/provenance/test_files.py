"""A file is there whole or not at all, and what killed writers left goes with the next one; a living one's stays."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from llava_cmoe.provenance.files import write_atomically, writing_tensors

VALUES = {"a": torch.ones(20_000)}


@pytest.fixture(scope="module")
def dead() -> int:
    """A process that was."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


LETTERS = st.characters(codec="ascii", categories=["L", "N", "P"], exclude_characters="/\\")
NAMES = st.text(LETTERS, min_size=1, max_size=9)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, other=NAMES)
def test_what_dead_writers_left_is_removed_and_nothing_else(tmp_path: Path, dead: int, name: str, other: str):
    (folder := tmp_path / "folder").mkdir(exist_ok=True)
    gone = [folder / f".{one}.{number}.unfinished" for one in (name, other) for number in (dead, 2**40)]
    stay = [folder / f".{other}.{os.getpid()}.unfinished", folder / f".{other}.1.unfinished",
            folder / f".{other}.x.unfinished", folder / f"{other}.{dead}.unfinished.x",
            folder / ".unfinished"]  # fmt: skip
    for path in (*gone, *stay):
        path.write_bytes(b"half")
    write_atomically(folder / "result", b"whole")
    assert not any(path.exists() for path in gone) and all(path.read_bytes() == b"half" for path in stay)
    assert (folder / "result").read_bytes() == b"whole"


def test_an_error_on_the_way_leaves_the_old_file_and_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "result"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [one.name for one in tmp_path.iterdir()] == ["result"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS])
def test_what_safetensors_says_of_the_system_is_the_systems_error(tmp_path: Path, number: int):
    with pytest.raises(OSError) as raised, writing_tensors(tmp_path):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    assert raised.value.errno == number and raised.value.filename == str(tmp_path)


@pytest.mark.parametrize("write", [lambda path: torch.save(VALUES, path), lambda path: save_file(VALUES, path)])
def test_a_file_that_does_not_fit_is_the_systems_error(tmp_path: Path, write: Callable[[Path], None]):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=str(tmp_path)), writing_tensors(tmp_path):
            write(tmp_path / "values")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("error", [SafetensorError("header too small"), RuntimeError("CUDA error")])
def test_any_other_error_stays_what_it_is(tmp_path: Path, error: Exception):
    with pytest.raises(type(error)) as raised, writing_tensors(tmp_path):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a pipe"])
def test_no_file_takes_the_place_of_what_is_none(tmp_path: Path, kind: str):
    """A rename replaces whatever its target is: of a device of the machine, too, where a writer may."""
    target = tmp_path / "target"
    with socket.socket(socket.AF_UNIX) as listening:
        if kind == "socket":
            listening.bind(str(target))
        else:
            os.mkfifo(tmp_path / "pipe")
            target.symlink_to("pipe") if "link" in kind else (tmp_path / "pipe").rename(target)
        before, names = target.lstat(), set(tmp_path.iterdir())
        with pytest.raises(OSError, match=r"is a device or a pipe, .* name a file: .*target"):
            write_atomically(target, b"whole")
        assert os.path.samestat(target.lstat(), before) and set(tmp_path.iterdir()) == names
