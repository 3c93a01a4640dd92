"""`progress.html` in a run folder: one file that opens from disk, shows how far the run is, and loads itself anew.

It runs no script and loads nothing; whatever comes from the run is escaped. A page that cannot be written is a warning:
what is learned does not depend on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup
from pydantic import ValidationError

from llava_cmoe.evaluation.log import Results
from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.report.page_grids import EDGE, HEIGHT, WIDTH, Cell, Grid, matrix_grid
from llava_cmoe.report.pages import policy_of, style_of, template_of
from llava_cmoe.runs.progress import Phase, RunProgress, StageProgress, clock

logger = logging.getLogger(__name__)

FILE = "progress.html"
SECONDS = 30.0
"""Between two pages within a stage, at least; a page that is looked at loads itself anew as often."""
MOST_POINTS = 150
"""Of a curve that is drawn."""


@dataclass(frozen=True)
class LossCurve:
    """The losses of one stage; `lines` are a phase and its points each."""

    stage: str
    spoken: str
    lines: tuple[tuple[str, str], ...]


class ProgressPage:
    """Keeps the page, and what a resumed run needs to go on with it, up to date."""

    def __init__(self, progress: RunProgress, now: Callable[[], float] = time.monotonic) -> None:
        """Of a run that somebody else moves on; writes nothing before it has."""
        self._progress, self._now = progress, now
        self._written: tuple[int, float] | None = None
        self._has_warned = False

    def moved(self) -> None:
        """Called after every step of the run: writes where a stage has begun, or it is time."""
        if self._progress.phase is None:
            return
        current, now = self._progress.course.current, self._now()
        if self._written is None or self._written[0] != current or now - self._written[1] >= SECONDS:
            self._written = current, now
            self._write()

    def ended(self, is_finished: bool) -> None:
        """Called when the run has come to its end, or was stopped.

        One that was stopped before it did anything may have been refused, because another process is at work there.
        """
        if self._progress.phase is not None or (is_finished and self._progress.was_kept):
            self._progress.course.state = "finished" if is_finished else "stopped"
            self._write()

    def _write(self) -> None:
        try:
            self._progress.keep()
            write_atomically(self._progress.run / FILE, progress_page(self._progress).encode())
        except OSError as error:
            if not self._has_warned:
                logger.warning("%s is not written: %s", self._progress.run / FILE, error.strerror or error)
            self._has_warned = True


def progress_page(progress: RunProgress) -> str:
    """The page's text: where the run is, its stages, its losses, its accuracies so far."""
    course, style = progress.course, Markup(style_of())
    is_running, results = course.state == "running", _results(progress.run)
    return template_of(Path(__file__).with_name("progress.html.j2")).render(
        title=f"{progress.run.name}: {_state(progress)}",
        policy=policy_of(style),
        style=style,
        refresh=int(SECONDS) if is_running else None,
        now=_now(progress) if is_running else "",
        written=datetime.now(UTC).isoformat(" ", "seconds").removesuffix("+00:00"),
        stages=_stages(progress),
        curves=_curves(course.stages),
        matrix=None if results is None else matrix_grid(results),
    )


def _state(progress: RunProgress) -> str:
    course = progress.course
    done = f"stage {course.current + 1} of {len(course.stages)}"
    return "finished" if course.state == "finished" else f"{course.state} in {done}"


def _now(progress: RunProgress) -> str:
    """What it does, and what is left."""
    course, left = progress.course, progress.left
    phases = course.stages[course.current].phases
    doing = next((f"{one.name}, {one.done} of {one.total}" for one in phases if one is progress.phase), "")
    told = {"of this": left.phase, "of the stage": left.stage, "of the sequence": left.sequence}
    known = ", ".join(f"{clock(seconds)} {what}" for what, seconds in told.items() if seconds is not None)
    return f"{course.stages[course.current].name}: {doing}. Left, about: {known or 'not known yet'}."


def _stages(progress: RunProgress) -> Grid:
    course, rows = progress.course, []
    for index, stage in enumerate(course.stages):
        is_done = index < course.current or course.state == "finished"
        state = "done" if is_done else course.state if index == course.current else "waiting"
        phases = "; ".join(_phases(stage, progress.phase))
        taken = clock(stage.seconds) if stage.phases else ""
        rows.append((f"{index + 1} {stage.name}", (Cell(state), Cell(phases), Cell(taken))))
    return Grid("stages", "Stages", ("stage", "state", "phases", "time"), tuple(rows), is_text=True)


def _phases(stage: StageProgress, current: Phase | None) -> Iterator[str]:
    """Every training and what is being done now; the many parts of an evaluation together."""
    others = [phase for phase in stage.phases if not phase.losses and phase is not current]
    for phase in stage.phases:
        if phase.losses or phase is current:
            how_far = "" if phase.done == phase.total else f" {phase.done} of {phase.total}"
            yield f"{phase.name}{how_far} ({clock(phase.seconds)})"
    if others:
        yield f"{len(others)} other parts ({clock(sum(phase.seconds for phase in others))})"


def _curves(stages: list[StageProgress]) -> list[LossCurve]:
    """One drawing a stage, all on one scale from 0 to the highest loss."""
    most = max((loss for stage in stages for phase in stage.phases for _, loss in phase.losses), default=0.0)
    return [
        LossCurve(
            stage.name,
            "; ".join(f"{one.name} {' to '.join(f'{loss:.3f}' for loss in _ends(one))}" for one in learned),
            tuple((one.name, _line(one, max(most, 1e-9))) for one in learned),
        )
        for stage in stages
        if (learned := [phase for phase in stage.phases if phase.losses])
    ]


def _ends(phase: Phase) -> list[float]:
    """The first and the last loss; one alone is both."""
    return [loss for _, loss in dict.fromkeys((phase.losses[0], phase.losses[-1]))]


def _line(phase: Phase, most: float) -> str:
    points = phase.losses[:: -(-len(phase.losses) // MOST_POINTS)]  # rounded up
    points = 2 * points if len(points) == 1 else points  # a line of no length is drawn as a dot
    across, down = WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE
    return " ".join(
        f"{EDGE + across * step / max(1, phase.total, step):.1f},{HEIGHT - EDGE - down * max(0.0, loss) / most:.1f}"
        for step, loss in points
    )


def _results(run: Path) -> Results | None:
    """The results so far, as they stand there: whoever computes with them verifies them. None before there are any."""
    try:
        return Results.model_validate_json((run / "results.json").read_bytes())
    except (OSError, ValidationError):
        return None
