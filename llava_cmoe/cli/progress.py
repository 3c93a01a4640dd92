"""How far a run is: one live line in a terminal, one line per finished part anywhere else.

Answers the calls that long work makes on its way: `(where, what, done, total)` for one run, and the loss where there is
one; `moved` and `ended` for many.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llava_cmoe.runs.progress import RunProgress, clock

if TYPE_CHECKING:
    from llava_cmoe.runs.progress_page import ProgressPage

COLUMNS = (TextColumn("[bold]{task.fields[where]}"), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
REMAINING = (TextColumn("left"), TimeRemainingColumn())
RUN_REMAINING = (TextColumn("{task.fields[left]}"),)


class _LiveLine:
    """A live line while it is entered, in a terminal only, and lines that stay above it."""

    remaining: ClassVar[Sequence[ProgressColumn]] = REMAINING

    def __init__(self, console: Console, speed_estimate_period: float = 30.0) -> None:
        self._console = console
        self._live = Progress(
            *COLUMNS,
            *self.remaining,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=speed_estimate_period,
        )

    def __enter__(self) -> Self:
        """Show the live line."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the live line away; what was said stays."""
        self._live.stop()

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class ProgressLine(_LiveLine):
    """Call it with where the work is, what is being done, how much is done and how much there is.

    A change of `where` or `what` begins a new part. In a terminal a line stays for each finished `where`; the parts
    within it share the live line, because a long sequence is evaluated in hundreds of them.
    """

    def __init__(self, console: Console) -> None:
        """Print to `console`; nothing is shown before the first call."""
        super().__init__(console)
        self._bar = self._live.add_task("", total=None, visible=False, where="", left="")
        self._where, self._what = "", ""
        # The first call comes when a part of it is done already, so a part begins where the one before ended.
        self._where_began = self._what_began = self._last = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the live line away; what was finished stays, what broke off leaves no line."""
        super().__exit__(kind, error, trace)
        if kind is None:
            self._end_where()

    def __call__(self, where: str, what: str, done: int, total: int, loss: float | None = None, /) -> None:
        """Move on; `done` equal to `total` ends a part. A loss is shown until the next one, or the part's end."""
        now = time.monotonic()
        if where != self._where:
            self._end_where()
            self._where, self._where_began, self._what = where, self._last, ""
        if what != self._what:
            self._what, self._what_began = what, self._last
            self._live.reset(
                self._bar, total=total, visible=True, description=escape(what), where=escape(where), left=""
            )
        if loss is not None:
            self._live.update(self._bar, description=escape(f"{what}, loss {loss:.3f}"))
        self._live.update(self._bar, completed=done, total=total)
        self._last = now
        if done == total and not self._console.is_terminal:
            self._say(f"{where}: {what}, {clock(now - self._what_began)}")

    def _end_where(self) -> None:
        if self._where and self._console.is_terminal:
            self._say(f"{self._where}: done in {clock(self._last - self._where_began)}")


class RunLine(ProgressLine):
    """The line of a run that learns: with what is left of the stage and of the sequence; keeps the run's page."""

    remaining = RUN_REMAINING

    def __init__(self, console: Console, progress: RunProgress, page: ProgressPage | None) -> None:
        """Follow a run; `page` is kept by one process of a launch."""
        super().__init__(console)
        self._progress, self._page = progress, page

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As any line; the page says how it ended."""
        super().__exit__(kind, error, trace)
        if self._page is not None:
            self._page.ended(kind is None)

    def __call__(self, where: str, what: str, done: int, total: int, loss: float | None = None, /) -> None:
        """Move on."""
        super().__call__(where, what, done, total, loss)
        self._progress(where, what, done, total, loss)
        left = self._progress.left
        told = {"phase": left.phase} if left.stage is None else {"stage": left.stage, "all": left.sequence}
        known = ", ".join(f"{name} {clock(seconds)}" for name, seconds in told.items() if seconds is not None)
        self._live.update(self._bar, left=f"left: {known}" if known else "")
        if self._page is not None:
            self._page.moved()


class StudyLine(_LiveLine):
    """One bar over many runs, with the time left and the names of those at work; a line for each run that ends."""

    def __init__(self, console: Console, total: int) -> None:
        """Print to `console`; `total` runs, those that are finished already included."""
        # A run takes minutes: the speed is that of the whole study, not of the last 30 seconds.
        super().__init__(console, speed_estimate_period=math.inf)
        self._bar = self._live.add_task("", total=total, where="")
        self._total = total

    def moved(self, done: float, working: Sequence[str]) -> None:
        """So many runs are done, parts of runs counted, and these are at work."""
        where = f"{int(done)}/{self._total} runs"
        self._live.update(self._bar, completed=done, where=where, description=escape(", ".join(working)))

    def ended(self, name: str, seconds: float, failure: str | None) -> None:
        """A run is finished, or `failure` says what became of it."""
        became = "failed" if failure else "learned"
        self._say(f"{name}: {became} after {clock(seconds)}")
        if failure:
            self._say(failure)
