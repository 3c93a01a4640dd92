"""The campaign's own tools do what they count on, and its page is what its committed figures give."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from campaign.children import in_child
from campaign.disk import Disk, Kept, _survives, die
from campaign.page import reliability_page
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.provenance.files import sync, write_atomically

REPOSITORY = Path(__file__).parents[1]


def write_some(folder: Path) -> None:
    """Two operations of every kind but a link."""
    (folder / "new").mkdir()
    write_atomically(folder / "new/whole", b"whole")
    (folder / "loose").write_bytes(b"loose")
    sync(folder)
    (folder / "later").write_bytes(b"later")
    (folder / "loose").unlink()


def count(folder: Path) -> list[str]:
    found = list[str]()

    def counted() -> list[str]:
        Disk(folder, 1, lambda disk, operation: found.append(operation))
        write_some(folder)
        return found

    operations: list[str] = in_child(counted).value
    return operations


def test_every_operation_is_seen_once(tmp_path: Path):
    assert [operation.split()[0] for operation in count(tmp_path)] == [
        *("os.mkdir", "open", "fsync", "os.rename", "open", "fsync", "open", "os.remove")
    ]


@pytest.mark.parametrize("chance", range(6))
def test_a_power_cut_keeps_what_was_synced_and_no_name_before_an_earlier_one(tmp_path: Path, chance: int):
    (tmp_path / "counted").mkdir()
    num_operations = len(count(tmp_path / "counted"))
    for number in range(1, num_operations + 1):
        folder = tmp_path / f"{chance}_{number}"
        folder.mkdir()

        def cut(folder: Path = folder, number: int = number) -> None:
            disk = Disk(folder, number, lambda disk, _: disk.lose_power(random.Random(chance)))
            disk.follow()
            write_some(folder)

        assert in_child(cut).status == -signal.SIGKILL
        left = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
        whole = folder / "new/whole"
        assert not whole.exists() or whole.read_bytes() == b"whole"  # synced before it was renamed
        assert "later" not in left or "new/whole" in left
        assert number <= 6 or whole.exists()  # the folder was synced


def test_a_kill_leaves_what_was_written(tmp_path: Path):
    def killed() -> None:
        Disk(tmp_path, 7, lambda *_: die())
        write_some(tmp_path)

    assert in_child(killed).status == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"new", "loose"}


@given(st.binary(), st.none() | st.binary(), st.integers())
def test_of_a_file_that_was_not_synced_a_beginning_or_zeros_or_the_old_one_is_left(
    content: bytes, durable: bytes | None, seed: int
):
    left = _survives(Kept(1, 0o644, content, durable), random.Random(seed))
    assert content.startswith(left) or left == durable or left == bytes(len(content))
    assert durable != content or left == content


def test_a_case_that_hangs_or_raises_is_told():
    assert in_child(lambda: signal.pause(), seconds=0.2).status is None
    raised = in_child(lambda: 1 / 0)
    assert raised.status == 70 and "ZeroDivisionError" in raised.told
    assert in_child(lambda: os.getpid()).value != os.getpid()


def test_the_page_is_what_the_committed_figures_give():
    figures = json.loads((REPOSITORY / "eval/results/reliability.json").read_text())
    assert (REPOSITORY / "docs/reliability.md").read_text() == reliability_page(figures)
    assert set(figures) == {"kills", "corruption", "inputs", "security", "mistakes"}
