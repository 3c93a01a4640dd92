"""Many small cases in a few processes: one that hangs, dies or eats memory ends its worker, and counts as that."""

from __future__ import annotations

import faulthandler
import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, TextIO

LONGEST = 60.0
"""Seconds after which a case counts as one that hangs, on a machine that does other work, too."""
MEMORY = 8 * 2**30
"""Bytes of address space that a worker may take beyond what it began with."""
LONGEST_LINE = 1_000
"""Characters that one line of an error may have, paths included."""

Verdict = tuple[str, str, str | None]
"""Kind of a case, its outcome, and which promise it broke."""


def in_workers(
    kind_of: Callable[[int], str], attempt: Callable[[int], Verdict], left: Callable[[], bool]
) -> Iterator[Verdict]:
    """Run cases 0, 1, ... while there is time; yields their verdicts, of the drawn kind where a case has none."""
    number = 0
    while left():
        reader, writer = os.pipe()
        where = tempfile.TemporaryFile("w+")  # noqa: SIM115 - for both processes
        if not (child := os.fork()):
            os.close(reader)
            _work(kind_of, attempt, left, number, writer, where)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            last = "nothing"
            while True:
                ready, _, _ = select.select([stream], [], [], LONGEST)
                line = stream.readline() if ready else b""
                if not line:
                    break
                said = json.loads(line)
                number = said["number"] + 1
                if "verdict" in said:
                    yield tuple(said["verdict"])
                else:
                    last = said["kind"]
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != 0 and left():
            how = "died" if ready else "hung"
            where.seek(0)
            yield (last, how, f"case {number - 1} {how}: {where.read()[:900]}")
        where.close()


def _work(
    kind_of: Callable[[int], str],
    attempt: Callable[[int], Verdict],
    left: Callable[[], bool],
    number: int,
    writer: int,
    where: TextIO,
) -> None:
    with open("/proc/self/statm") as stream:
        size = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)

    def say(**said: Any) -> None:
        os.write(writer, json.dumps(said).encode() + b"\n")

    sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(quiet, "w", closefd=False), line_buffering=True)
    while left():
        say(number=number, kind=kind_of(number))
        faulthandler.dump_traceback_later(LONGEST - 5, file=where)
        try:
            verdict = attempt(number)
        except BaseException:  # noqa: BLE001 - whatever it is, it is to be counted
            verdict = ("the campaign itself", "traceback", f"case {number}: {traceback.format_exc()[-1500:]}")
        say(number=number, verdict=verdict)
        number += 1
    os._exit(0)


@dataclass(frozen=True)
class Met:
    """How a call met its input: `accepted` with a value, `refused` with what a user reads, or `traceback`."""

    outcome: str
    value: Any
    told: str

    def faults(self, *names: object) -> str | None:
        """What is wrong with a refusal: every line short, and one of `names` in it, given as text."""
        if self.outcome == "traceback":
            return self.told[-900:]
        if self.outcome == "accepted":
            return None
        lines = [line for line in self.told.splitlines() if line.strip()]
        if not any(line.startswith("error: ") for line in lines):
            return f"no error in {self.told[:300]!r}"
        if longest := [line for line in lines if len(line) > LONGEST_LINE]:
            return f"a line of {len(longest[0])} characters: {longest[0][:200]}"
        if names and not any(str(name) in self.told for name in names):
            return f"names none of {', '.join(map(str, names))}: {self.told[:300]}"
        return None


def meet(call: Callable[[], Any]) -> Met:
    """Make a call as a command would, and see what a user would read."""
    import typer

    from llava_cmoe.cli.console import user_errors

    told = io.StringIO()
    try:
        with redirect_stderr(told), redirect_stdout(io.StringIO()), user_errors():
            value = call()
    except typer.Exit:
        return Met("refused", None, told.getvalue())
    except Exception:  # noqa: BLE001 - to be counted
        return Met("traceback", None, traceback.format_exc())
    return Met("accepted", value, told.getvalue())
