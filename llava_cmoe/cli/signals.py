"""A command that is told to stop ends in one line, with the status that a shell gives a command that died of a signal.

What it was writing is not there yet, or whole: files are renamed into place, so nothing has to be cleaned up here.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

HEEDED = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGHUP") if name in signal.Signals.__members__)
"""Ctrl-C is Python's own KeyboardInterrupt."""


class Stopped(BaseException):
    """A signal came; no handler of ordinary errors is to take it for one.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a line and an exit status: 130, 143 and 129."""
    try:
        with _heeding():
            yield
    except KeyboardInterrupt as error:
        raise _ended(signal.SIGINT) from error
    except Stopped as error:
        raise _ended(signal.Signals(error.number)) from error


def _ended(number: signal.Signals) -> typer.Exit:
    typer.echo(f"stopped by {number.name}: what was finished is kept, and the same command goes on", err=True)
    return typer.Exit(128 + number)


@contextmanager
def _heeding() -> Iterator[None]:
    """Let the main thread raise Stopped; what is ignored (`nohup`), or another's already, stays so."""
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked helper dies of it, as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Stopped(number)

    is_main = threading.current_thread() is threading.main_thread()
    free = [number for number in HEEDED if is_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in free:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)
