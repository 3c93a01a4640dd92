"""Learns runs several at a time, each in a process of its own; what the runs are is `plan.py`'s.

A process is the ordinary `llava-cmoe train`, so a run that was killed goes on as any run does. Its log is locked while
it writes there: where a study was killed and its runs were not, the next study waits for them. Runs that differ in the
locator alone share what one of them learns, and wait for it (`relocating.py`), whoever learns it.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

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

    def elsewhere(self, name: str, log: Path) -> None:
        """A run is waited for, as a process that this call did not start learns it and writes this log."""

    def ended(self, name: str, seconds: float, failure: str | None) -> None:
        """A run is finished, or `failure` says what became of it."""


@dataclass(frozen=True)
class _Working:
    run: PlannedRun
    place: Place
    process: subprocess.Popen[bytes] | None
    """None where another call's process learns the run; it takes a place, too, as it needs its share of the machine."""
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
    """Learn what is not finished yet; Ctrl-C and SIGTERM end the processes of this call and no others.

    SIGTERM is heeded in the main thread only, as Python lets no other one handle signals.

    Args:
        runs: in the order in which they start.
        share: as many processes at a time as there are places.
        watcher: told about the runs, several times a second.

    Returns:
        The runs that failed.

    Raises:
        SystemExit: SIGTERM came; it carries the status that a shell gives a command which died of it.
    """
    waiting = [run for run in runs if run.results() is None]
    free, working, failed = list(share), list[_Working](), list[PlannedRun]()

    def end(run: PlannedRun, seconds: float, failure: str | None) -> None:
        if failure is not None:
            failed.append(run)
        watcher.ended(run.name, seconds, failure)

    with _noticing_sigterm() as noticed:
        try:
            while (waiting or working) and not noticed:
                while free and (ready := [run for run in waiting if not _waits(run, working, waiting)]):
                    run = ready[0]
                    waiting.remove(run)
                    if run.results() is not None:
                        continue  # another process finished it since this call began
                    working.append(_start(run, free.pop(0)))
                    if working[-1].process is None:
                        watcher.elsewhere(run.name, run.log)
                for job in [job for job in working if _is_over(job)]:
                    working.remove(job)
                    free.append(job.place)
                    if job.process is None and job.run.results() is None:
                        waiting.insert(0, job.run)  # its process was stopped; it goes on here
                    else:
                        end(job.run, time.monotonic() - job.began, _failure(job))
                num_done = len(runs) - len(waiting) - len(working)
                watcher.moved(num_done + sum(map(_share_done, working)), [job.run.name for job in working])
                if working:
                    time.sleep(POLL)
        finally:
            _stop([job.process for job in working if job.process is not None])
    return failed


def command(run: PlannedRun) -> list[str]:
    """The ordinary command that learns a run, with the interpreter of this process."""
    experts = ["--experts", str(run.source.recipe.run)] if run.source and run.source.results() else []
    return [sys.executable, "-m", "llava_cmoe.cli", "train", *run.words, *experts]


@contextmanager
def _noticing_sigterm() -> Iterator[Sequence[int]]:
    """Note SIGTERM down instead of dying of it, and leave with its status at the end.

    Raised by the handler, an exception could lose a process that is just being started, or break off the clean-up.
    """
    noticed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: noticed.append(number))
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGTERM, before)
    if noticed:
        raise SystemExit(128 + signal.SIGTERM)


def _waits(run: PlannedRun, working: Sequence[_Working], waiting: Sequence[PlannedRun]) -> bool:
    """Whether the run that learns a run's experts is not done yet; one that failed is not waited for."""
    return run.source is not None and any(run.source is other for other in (*waiting, *(job.run for job in working)))


def _start(run: PlannedRun, place: Place) -> _Working:
    """Start a run, unless its log is locked: then another process learns it."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        if not _lock(log):
            return _Working(run, place, None, time.monotonic(), 0)
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


def _lock(log: BinaryIO) -> bool:
    """Lock a log unless another process has.

    The lock is the open file's, which a process started with it inherits: it ends when the last one that writes there
    ends.
    """
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_over(job: _Working) -> bool:
    """Whether the process has ended; another call's has once its log can be locked."""
    if job.process is not None:
        return job.process.poll() is not None
    with job.run.log.open("ab") as log:
        return _lock(log)


def _failure(job: _Working) -> str | None:
    """The status and the end of the log of a process that failed."""
    if job.process is None or job.process.returncode == 0:
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
