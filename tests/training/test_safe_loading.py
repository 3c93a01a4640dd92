"""Nothing that lies in a run folder is run: a checkpoint with more than values is not gone on from."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cmoe.training.checkpoints import COMPLETE, last_complete, mark_complete
from llava_cmoe.training.safe_loading import DEEPSPEED, FORBIDDEN, FORCED, foreign_contents, values_alone

ORIGIN = {"processes": 1}


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def zipped(marker: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"module": {"weight": torch.ones(2)}, "more": [Evil(marker)]}, stream)
    return stream.getvalue()


def legacy(marker: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"more": Evil(marker)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def bare(marker: Path) -> bytes:
    return pickle.dumps(Evil(marker))


def protocol_five(marker: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"more": Evil(marker)}, stream, pickle_protocol=5)
    return stream.getvalue()


def garbage(marker: Path) -> bytes:
    return b"PK\x03\x04 no archive"


def empty_archive(marker: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("other/file", "x")
    return stream.getvalue()


FOREIGN: list[Callable[[Path], bytes]] = [zipped, legacy, bare, protocol_five, garbage, empty_archive]
NAMES = (
    "global_step5/mp_rank_00_model_states.pt",
    "global_step5/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
)


def complete(folder: Path, number: int) -> Path:
    """A checkpoint as this program leaves one, of every kind of file."""
    checkpoint = folder / f"checkpoint-{number}"
    (checkpoint / f"global_step{number}").mkdir(parents=True)
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "groups": [{"lr": 1e-3}]}, checkpoint / "optimizer.pt")
    torch.save({"numpy": np.random.RandomState(0).get_state(), "cpu": torch.ones(2)}, checkpoint / "rng_state.pth")
    mark_complete(checkpoint, ORIGIN)
    return checkpoint


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", FOREIGN)
def test_a_checkpoint_with_more_than_values_is_not_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: Callable[[Path], bytes]
) -> None:
    marker = tmp_path / "ran"
    for number in (5, 10):
        complete(tmp_path, number)
    file = tmp_path / "checkpoint-10" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content(marker))
    assert last_complete(tmp_path, ORIGIN) == tmp_path / "checkpoint-5"
    assert f"checkpoint-10 is not gone on from, it was not written here: {file.name}" in caplog.text
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [zipped, legacy, bare, protocol_five])
@pytest.mark.parametrize("environment", [{}, {FORBIDDEN: "1"}, {FORCED: "0"}])
def test_no_caller_can_load_more_than_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Callable[[Path], bytes], environment: dict[str, str]
) -> None:
    """As DeepSpeed does, which asks for all that a pickle says."""
    for name in (FORCED, FORBIDDEN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    marker, file = tmp_path / "ran", tmp_path / "states.pt"
    file.write_bytes(content(marker))
    with values_alone(deepspeed=True), pytest.raises((pickle.UnpicklingError, RuntimeError)):
        torch.load(file, weights_only=False)
    assert not marker.exists()
    assert {name: os.environ[name] for name in (FORCED, FORBIDDEN) if name in os.environ} == environment


def test_what_deepspeed_writes_is_read(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    states = {"scaler": LossScaler(scale=2.0), "stage": ZeroStageEnum.gradients, "at": fragment_address(2, 3)}
    (tmp_path / "global_step5").mkdir()
    torch.save(states, tmp_path / "global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert foreign_contents(tmp_path) is None
    with values_alone(deepspeed=True):
        read = torch.load(tmp_path / "global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)
    assert (read["scaler"].loss_scale, read["stage"], read["at"]) == (2.0, ZeroStageEnum.gradients, states["at"])
    assert len(DEEPSPEED) == len(states)


@settings(max_examples=40)
@given(data=st.data())
def test_a_checkpoint_that_was_damaged_is_not_gone_on_from(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("stage")
    whole, damaged = complete(folder, 95), complete(folder, 105)
    assert last_complete(folder, ORIGIN) == damaged
    file = data.draw(st.sampled_from(["optimizer.pt", "rng_state.pth", COMPLETE, "scheduler.pt"]))
    match data.draw(st.sampled_from(["flip", "cut", "delete"])):
        case _ if file == "scheduler.pt":
            (damaged / file).write_bytes((damaged / "optimizer.pt").read_bytes())  # one that nobody wrote
        case "delete":
            (damaged / file).unlink()
        case how:
            content = bytearray((damaged / file).read_bytes())
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] ^= 1 << data.draw(st.integers(0, 7))
            (damaged / file).write_bytes(content if how == "flip" else content[:place])
    assert last_complete(folder, ORIGIN) == whole
