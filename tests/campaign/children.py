"""A case in a process of its own: forked from one that has imported everything, and ended when it takes too long.

So a case costs no import, may be killed for real, and leaves nothing behind in the process that counts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

LONGEST = 400.0
"""Seconds after which a case counts as one that hangs."""
CRASHED = 70
"""Status of a case that raised."""


@dataclass(frozen=True)
class Ended:
    """How a case ended.

    Attributes:
        status: exit status; minus the number of the signal that ended it; None where it had to be ended.
        value: what it returned, as JSON gives it back; None where it did not return.
        told: what it wrote to either stream.
    """

    status: int | None
    value: Any
    told: str


def in_child(
    case: Callable[[], Any], seconds: float = LONGEST, sent: tuple[float, signal.Signals] | None = None
) -> Ended:
    """Run a case.

    Args:
        case: what is run; SystemExit gives the status.
        seconds: that it may take.
        sent: after how many seconds which signal is sent.
    """
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as returned:
        if not (child := os.fork()):
            _run(case, told.fileno(), returned.fileno())
        status = _wait(child, seconds, sent)
        told.seek(0)
        returned.seek(0)
        written = returned.read()
        return Ended(status, json.loads(written) if written else None, told.read().decode(errors="replace"))


def _run(case: Callable[[], Any], told: int, returned: int) -> None:
    status = CRASHED
    try:
        os.dup2(told, 1)
        os.dup2(told, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # nobody captures a case
        value = case()
        os.write(returned, json.dumps(value).encode())
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - whatever it is, the parent is to count it
        traceback.print_exc()
    finally:
        with suppress(ValueError, OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _wait(child: int, seconds: float, sent: tuple[float, signal.Signals] | None) -> int | None:
    began, hung = time.monotonic(), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return None if hung else os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        if sent is not None and passed >= sent[0]:
            os.kill(child, sent[1])
            sent = None
        if passed >= seconds and not hung:
            os.kill(child, signal.SIGKILL)
            hung = True
        time.sleep(0.002)
