"""Learns several runs at a time, each in a process of its own; which runs a study has is `plan.py`'s.

A process is the ordinary `llava-cmoe train`, so a run that failed or was ended goes on as any run does. Runs that
differ in the locator alone share what one of them learns, and wait for it (`analyses/refit_locator.py`).

Nothing here keeps two processes off one run folder. Ctrl-C and SIGTERM end the processes of a study, SIGKILL cannot:
end those that it leaves at work before the same study is started again.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

Slot = Mapping[str, str]
"""Environment variables that give a process its share of the machine."""


class Watcher(Protocol):
    """Shows how far the runs are."""

    def moved(self, done: float, working: Sequence[str]) -> None:
        """Called several times a second: number of runs done, parts of runs counted, and the names of those at work."""

    def ended(self, name: str, seconds: float, failure: str | None) -> None:
        """Called after each run; `failure` is its exit status with the end of its log, None where it succeeded."""


@dataclass(frozen=True)
class _Job:
    run: PlannedRun
    slot: Slot
    process: subprocess.Popen[bytes]
    began: float


def slots(jobs: int | None, num_runs: int) -> list[Slot]:
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


def learn_all(runs: Sequence[PlannedRun], share: Sequence[Slot], watcher: Watcher) -> list[PlannedRun]:
    """Learn what is not finished yet, in the main thread; Ctrl-C and SIGTERM end the processes that were started.

    Args:
        runs: in the order in which they start.
        share: as many processes at a time as there are slots.
        watcher: called several times a second, and after each run.

    Returns:
        The runs that failed.

    Raises:
        SystemExit: SIGTERM came; it carries the status that a shell gives a command which died of it.
    """
    waiting = [run for run in runs if run.results() is None]
    free, working, failed = list(share), list[_Job](), list[PlannedRun]()
    with _noting_sigterm() as noted:
        try:
            while (waiting or working) and not noted:
                unfinished = (*waiting, *(job.run for job in working))
                ready = [run for run in waiting if not any(run.source is other for other in unfinished)]
                for run in ready[: len(free)]:
                    waiting.remove(run)
                    working.append(_start(run, free.pop(0)))
                for job in [job for job in working if job.process.poll() is not None]:
                    working.remove(job)
                    free.append(job.slot)
                    if failure := _failure(job):
                        failed.append(job.run)
                    watcher.ended(job.run.name, time.monotonic() - job.began, failure)
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


@contextmanager
def _noting_sigterm() -> Iterator[Sequence[int]]:
    """Note SIGTERM instead of dying of it, and leave with its status at the end.

    An exception raised by the handler could lose a process that is just being started, or break off the clean-up.
    """
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
    if noted:
        raise SystemExit(128 + signal.SIGTERM)


def _start(run: PlannedRun, slot: Slot) -> _Job:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    words = command(run)
    with run.log.open("ab") as log:
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **slot}
        )
    return _Job(run, slot, process, time.monotonic())


def _failure(job: _Job) -> str | None:
    """The status and the end of the log of a process that failed."""
    if job.process.returncode == 0:
        return None
    lines = job.run.log.read_text(errors="replace").splitlines()[-TAIL:]
    return "\n".join([f"status {job.process.returncode}; {job.run.log} ends:", *(f"  {line}" for line in lines)])


def _share_done(job: _Job) -> float:
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
