"""Disturbances of a run's place, one of each: a second process, a full or read-only disk, a moved folder, a clock."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from campaign.children import in_child
from campaign.disk import Disk, die
from campaign.tally import Tally
from campaign.world import World, differences, learn, type_in

HALF_WAY = 120
"""File operations: one stage is learned and evaluated, the second begun."""


def run(world: World, tally: Tally) -> None:
    """One case of each."""
    for case in (second_process, full_disk, small_files, read_only, moved, clock_set_back):
        name = case.__name__.replace("_", " ")
        broken = case(world, world.case(case.__name__))
        tally.add(name, "ended the same" if broken is None else "broken", broken)


def finished(world: World, run: Path) -> str | None:
    """How a run that goes on differs from the undisturbed one in the end."""

    def compared() -> list[str]:
        learn(world, run)
        return list(differences(run, world.whole))

    ended = in_child(compared)
    return ended.told[-600:] if ended.value is None else "; ".join(ended.value) or None


def one_line(world: World, run: Path, case: Callable[[], None], told: str) -> str | None:
    """What is wrong with how a command was refused."""
    ended = in_child(case)
    lines = [line for line in ended.told.splitlines() if line.startswith("error:")]
    if ended.status != 2 or len(lines) != 1 or told not in lines[0] or "Traceback" in ended.told:
        return f"status {ended.status}: {ended.told[-600:]}"
    return None


def killed_half_way(world: World, run: Path) -> None:
    """Let a run learn a stage and some of the next."""
    run.mkdir(parents=True, exist_ok=True)

    def dying() -> None:
        Disk(run, HALF_WAY, lambda *_: die())
        learn(world, run)

    assert in_child(dying).status == -signal.SIGKILL


def train(world: World, run: Path) -> Callable[[], None]:
    """The command that learns a run."""
    world.write_recipe(run)
    return type_in("train", run.parent / "recipe.yaml")


def second_process(world: World, run: Path) -> str | None:
    """The second is refused while the first lives, and disturbs nothing."""
    run.mkdir(parents=True)
    command = train(world, run)
    if not (first := os.fork()):
        learn(world, run)
        os._exit(0)
    while not (run / "run.json").exists():
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    broken = one_line(world, run, command, "another process is writing")
    os.kill(first, signal.SIGCONT)
    _, status = os.waitpid(first, 0)
    return broken or (f"the first ended with {status}" if status else None) or finished(world, run)


def full_disk(world: World, run: Path) -> str | None:
    """A disk of a fourth of what a run needs; more room, and the run goes on. Needs a mount, else is left out."""
    run.mkdir(parents=True)
    if not mounted(run, "-o", "size=200k"):
        return None
    try:
        command = train(world, run)
        broken = one_line(world, run, command, "")
        remount = subprocess.run(["mount", "-o", "remount,size=100m", str(run)], capture_output=True)
        return broken or (None if remount.returncode == 0 else "no room was made") or finished(world, run)
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=True)


def mounted(run: Path, *options: str) -> bool:
    """Put a disk of its own at a folder, if this user may."""
    return subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(run)], capture_output=True).returncode == 0


def small_files(world: World, run: Path) -> str | None:
    """A limit on the size of files, which users without a mount meet as a quota."""
    command = train(world, run)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        command()

    return one_line(world, run, limited, "") or finished(world, run)


def read_only(world: World, run: Path) -> str | None:
    """A folder that becomes read-only after one stage was learned."""
    run.mkdir(parents=True)
    if not mounted(run, "-o", "size=100m"):
        return None
    try:
        command = train(world, run)
        killed_half_way(world, run)
        while subprocess.run(["mount", "-o", "remount,ro", str(run)], capture_output=True).returncode:
            time.sleep(0.1)  # a helper of the killed process may still be there
        broken = one_line(world, run, command, "Read-only file system")
        subprocess.run(["mount", "-o", "remount,rw", str(run)], check=True)
        return broken or finished(world, run)
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=True)


def moved(world: World, run: Path) -> str | None:
    """A run whose folder is moved after a kill goes on where it lies now."""
    killed_half_way(world, run)
    other = run.parent.with_name("moved_to") / "run"
    other.parent.mkdir()
    shutil.move(run, other)
    return finished(world, other)


def clock_set_back(world: World, run: Path) -> str | None:
    """A clock that runs a year behind the times of the files: all were made in the future."""
    killed_half_way(world, run)
    for path in (run, *run.rglob("*")):
        os.utime(path, (time.time() + 3e7,) * 2)
    return finished(world, run)
