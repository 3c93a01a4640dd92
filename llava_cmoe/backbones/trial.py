"""A call tried in a process of its own, which is ended where it takes too long or too much memory.

A chat template is a program that comes with a backbone. Its sandbox keeps it from files and from other code, but not
from loops without end, powers of powers, or texts that double until the memory is full: those no exception stops.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")
"""Where Linux says how much memory a process has; elsewhere only time is limited."""


def ends(call: Callable[[], object], seconds: int, memory: int) -> bool:
    """Whether a call comes back, or raises, in time and within the memory; what it returns and changes is forgotten.

    Args:
        call: must not need other threads: the forked process has this one alone.
        seconds: that it may take.
        memory: bytes that it may take beyond what this process has.
    """
    if not (child := os.fork()):
        with ExitStack() as stack:
            stack.callback(os._exit, 0)  # also where the call raises: that is for its caller to see
            _limit(seconds, memory)
            try:
                call()
            except MemoryError:
                os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _limit(seconds: int, memory: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.alarm(seconds)
    torch.set_num_threads(1)  # those of this process were not forked
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if STATM.exists():
        taken = int(STATM.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        if most == resource.RLIM_INFINITY or taken + memory < most:
            resource.setrlimit(resource.RLIMIT_AS, (taken + memory, most))
