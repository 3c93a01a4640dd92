"""Learns runs several at a time, each in a process of its own; what the runs are is `plan.py`'s.

A process is the ordinary `llava-cmoe train`, so a run that was killed goes on as any run does. Its log is locked while
it writes there: where a study was killed and its runs were not, the next study does not start them a second time. Runs
that differ in the locator alone share what one of them learns, and wait for it (`relocating.py`).
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llava_cmoe.studies.plan import PlannedRun

POLL = 0.5
"""Seconds between two looks at the processes."""
GRACE = 10.0
"""Seconds that a process has to end before it is killed."""
TAIL = 15
"""Lines of a failed run's log that are shown."""

Place = Mapping[str, str]
"""What a process finds in its environment beside this one's: its share of the machine."""


class Watcher(Protocol):
    """Is told how the runs get on."""

    def moved(self, done: float, working: Sequence[str]) -> None:
        """So many runs are done, parts of runs counted, and these are at work."""

    def ended(self, name: str, seconds: float, failure: str | None) -> None:
        """A run is finished, or `failure` says what became of it."""


@dataclass(frozen=True)
class _Working:
    run: PlannedRun
    place: Place
    process: subprocess.Popen[bytes]
    began: float
    log_start: int


def places(jobs: int | None, num_runs: int) -> list[Place]:
    """Equal shares of the machine: cores for each process and, where there are any, one GPU.

    Args:
        jobs: how many processes at a time; one per GPU, or one per core without any, where it is absent.
        num_runs: no more processes than this; count finished runs, too, so that a study that goes on gives each run as
            many threads as before (the order of a sum depends on them).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",")[:count] if given else [str(index) for index in range(count)]
    num = min(jobs or len(gpus) or cores, num_runs)
    threads = {"OMP_NUM_THREADS": str(max(1, cores // num))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}) for slot in range(num)]


def learn_all(runs: Sequence[PlannedRun], share: Sequence[Place], watcher: Watcher) -> list[PlannedRun]:
    """Learn what is not finished yet; an interruption ends the processes of this call and no others.

    Args:
        runs: in the order in which they start.
        share: as many processes at a time as there are places.
        watcher: told about the runs, several times a second.

    Returns:
        The runs that failed.
    """
    waiting = [run for run in runs if run.results() is None]
    free, working, failed = list(share), list[_Working](), list[PlannedRun]()

    def end(run: PlannedRun, seconds: float, failure: str | None) -> None:
        if failure is not None:
            failed.append(run)
        watcher.ended(run.name, seconds, failure)

    try:
        while waiting or working:
            while free and (ready := [run for run in waiting if not _waits(run, working, waiting)]):
                run = ready[0]
                waiting.remove(run)
                started = _start(run, free[0])
                if started is None:
                    end(run, 0.0, f"another process is learning it, see {run.log}; wait for that one, or end it")
                else:
                    working.append(started)
                    del free[0]
            for job in [job for job in working if job.process.poll() is not None]:
                working.remove(job)
                free.append(job.place)
                end(job.run, time.monotonic() - job.began, _failure(job))
            num_done = len(runs) - len(waiting) - len(working)
            watcher.moved(num_done + sum(map(_share_done, working)), [job.run.name for job in working])
            if working:
                time.sleep(POLL)
    finally:
        _stop([job.process for job in working])
    return failed


def command(run: PlannedRun) -> list[str]:
    """The ordinary command that learns a run, with the interpreter of this process."""
    experts = ["--experts", str(run.source.recipe.run)] if run.source and run.source.results() else []
    return [sys.executable, "-m", "llava_cmoe.cli", "train", *run.words, *experts]


def _waits(run: PlannedRun, working: Sequence[_Working], waiting: Sequence[PlannedRun]) -> bool:
    """Whether the run that learns a run's experts is not done yet; one that failed is not waited for."""
    return run.source is not None and any(run.source is other for other in (*waiting, *(job.run for job in working)))


def _start(run: PlannedRun, place: Place) -> _Working | None:
    """Start a run, or None where its log is locked."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        try:
            # The lock is the open file's, which the process inherits: it ends when the last one that writes there ends.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        log_start = log.tell()
        log.write(f"$ {shlex.join(command(run))}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command(run),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place},
        )
    return _Working(run, place, process, time.monotonic(), log_start)


def _failure(job: _Working) -> str | None:
    """The status and the end of the log of a process that failed."""
    if job.process.returncode == 0:
        return None
    with job.run.log.open("rb") as log:
        log.seek(job.log_start)
        lines = log.read().decode(errors="replace").splitlines()[-TAIL:]
    return "\n".join([f"status {job.process.returncode}; {job.run.log} ends:", *(f"  {line}" for line in lines)])


def _share_done(job: _Working) -> float:
    """A running run as a part of one; approximate, for the bar only."""
    return job.run.num_learned / (len(job.run.tasks) + 1)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
