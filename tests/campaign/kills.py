"""Runs that are killed, lose power, are told to stop or meet a full disk end like one that nobody disturbed."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from campaign import places
from campaign.children import Ended, in_child
from campaign.disk import Disk, die, refuse
from campaign.tally import Budget, Tally
from campaign.world import World, differences, learn, make_world, type_in

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def run(folder: Path, rng: random.Random, budget: Budget, tally: Tally) -> None:
    """All kinds of disturbance; operations of the disk get most of the time."""
    world = make_world(folder)
    places.run(world, tally)
    operations = count_operations(world)
    began = time.monotonic()
    in_child(lambda: learn(world, world.case("timed")))
    length = time.monotonic() - began
    tally.facts |= {"file_operations": len(operations), "stages": 3}

    crashes = [(number, rng.choice(("killed", "power"))) for number in range(1, len(operations) + 1)]
    rng.shuffle(crashes)
    errors = [(number, error) for number in range(1, len(operations) + 1) for error in ERRORS]
    rng.shuffle(errors)
    seen, index = set[int](), 0
    while budget.left() and (crashes or errors):
        index += 1
        case = index % 8
        if case == 6 and errors:
            failing(world, tally, *errors.pop(), index)
        elif case == 7:
            signalled(world, tally, rng.choice(list(SIGNALS)), rng.uniform(0, length), index)
        elif case in (2, 4):
            killed(world, tally, rng.uniform(0, length), index)
        elif crashes:
            number, how = crashes.pop()
            seen.add(number)
            crashed(world, tally, number, how, rng.random(), index, operations[number - 1])
    tally.facts["crashed_at"] = sorted(seen)


def count_operations(world: World) -> list[str]:
    """What an undisturbed run does to its folder, in order."""

    def counted() -> list[str]:
        run, found = world.case("counted"), list[str]()
        run.mkdir(parents=True)
        Disk(run, 1, lambda disk, operation: found.append(operation))
        learn(world, run)
        return found

    operations: list[str] = in_child(counted).value
    return operations


def crashed(world: World, tally: Tally, number: int, how: str, chance: float, index: int, operation: str) -> None:
    """A run dies at one file operation, where `power` also takes what was not synced."""
    run = world.case(index)

    def dying() -> None:
        run.mkdir(parents=True)
        disk = Disk(run, number, lambda disk, _: die() if how == "killed" else disk.lose_power(random.Random(chance)))
        if how == "power":
            disk.follow()
        learn(world, run)

    ended = noting(run, dying)
    kind = "killed at a file operation" if how == "killed" else "power cut at a file operation"
    told = None if ended.status == -signal.SIGKILL else f"did not die at {number}: {ended.told[-300:]}"
    goes_on(world, tally, kind, run, told or f"{number} ({operation}), chance {chance}", told is not None)


def killed(world: World, tally: Tally, moment: float, index: int) -> None:
    """A run is killed at a moment, and once more while it goes on."""
    run = world.case(index)
    for part in (moment, moment / 2):
        noting(run, lambda: learn(world, run), sent=(part, signal.SIGKILL))
    goes_on(world, tally, "killed at two random moments", run, f"after {moment:.3f} s")


def signalled(world: World, tally: Tally, number: signal.Signals, moment: float, index: int) -> None:
    """A command that is told to stop says so in one line."""
    run, kind = world.case(index), f"stopped by {number.name}"
    world.write_recipe(run)

    def stopped() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        type_in("train", run.parent / "recipe.yaml")()

    ended = noting(run, stopped, sent=(moment, number))
    if ended.status == -number:
        tally.add(kind, "too early or too late for the command to hear it")
        return
    lines = [line for line in ended.told.splitlines() if line.startswith("stopped by")]
    in_one_line = ended.status == 0 or (ended.status == SIGNALS[number] and len(lines) == 1)
    in_one_line = in_one_line and "Traceback" not in ended.told
    told = f"after {moment:.3f} s: status {ended.status}: {ended.told[-600:]}"
    goes_on(world, tally, kind, run, told, not in_one_line)


def failing(world: World, tally: Tally, number: int, error: int, index: int) -> None:
    """From one file operation on the system refuses: one line, and the same command goes on."""
    run, kind = world.case(index), f"refused by the system ({errno.errorcode[error]})"
    run.mkdir(parents=True)
    world.write_recipe(run)

    def refused() -> None:
        Disk(run, number, refuse(error))
        type_in("train", run.parent / "recipe.yaml")()

    ended = noting(run, refused)
    lines = [line for line in ended.told.splitlines() if line.startswith("error:")]
    in_one_line = ended.status == 0 or (ended.status == 2 and len(lines) == 1 and "Traceback" not in ended.told)
    goes_on(world, tally, kind, run, f"at {number}: status {ended.status}: {ended.told[-600:]}", not in_one_line)


def noting(run: Path, case: Callable[[], Any], **how: Any) -> Ended:
    """Run a case in a child that notes each stage, beside the run, once it is committed."""

    def noted() -> None:
        from llava_cmoe.registry.store import Registry

        commit = Registry.commit

        def committing(self: Registry, index: int, *args: Any, **kwargs: Any) -> Any:
            record = commit(self, index, *args, **kwargs)
            with (run.parent / "committed").open("a") as stream:
                stream.write(f"{index} {record.sha256}\n")
            return record

        Registry.commit = committing  # type: ignore[method-assign]
        case()

    run.parent.mkdir(parents=True, exist_ok=True)
    return in_child(noted, **how)


def goes_on(world: World, tally: Tally, kind: str, run: Path, told: str, is_broken: bool = False) -> None:
    """Let a disturbed run go on, and compare it with the undisturbed one."""
    lost = lost_stages(run)
    kept = stamps(run)
    ended = in_child(lambda: learn(world, run))
    if ended.status != 0:
        broken = [f"does not go on: {ended.told[-600:]}"]
    else:
        broken = list(in_child(partial(found_differences, run, world.whole)).value)
        broken += [f"{name} was written again" for name, at in kept.items() if stamps(run).get(name) != at]
    broken += lost
    if is_broken or broken:
        keep = run.parent.with_name(f"broken_{run.parent.name}")
        tally.add(kind, "broken", f"{told}: {'; '.join(broken) or 'not in one line'}")
        run.parent.rename(keep)
    else:
        tally.add(kind, "ended the same")
        shutil.rmtree(run.parent)


def found_differences(run: Path, whole: Path) -> list[str]:
    """For a child: what reading results needs is torch's."""
    return list(differences(run, whole))


def lost_stages(run: Path) -> list[str]:
    """Stages that were committed and are not there any more."""
    noted = run.parent / "committed"
    lines = dict(line.split() for line in noted.read_text().splitlines()) if noted.exists() else {}
    there = {}
    for path in sorted(run.glob("tasks/[0-9]*/record.json")):
        record = json.loads(path.read_text() or "{}")
        there[str(record.get("index"))] = record.get("sha256")
    return [f"stage {index} was committed and is lost" for index, sha in lines.items() if there.get(index) != sha]


def stamps(run: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file of a committed stage."""
    paths = sorted(run.glob("tasks/[0-9]*/*"))
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
