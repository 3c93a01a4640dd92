"""How far a run is: its stages, their phases and losses, what is left. Kept in the run, so that a resumed one goes on.

It tells times, so nothing of a run's results is computed from it, and no hash covers it; what cannot be read of an
earlier call begins anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError

from llava_cmoe.provenance.files import write_atomically

logger = logging.getLogger(__name__)

FILE = "progress.json"

MOST_LOSSES = 1000
"""Points that are kept of a phase's curve; of more, every second one goes."""


@dataclass
class Phase:
    """A part of a stage: `training`, or the answers to one task's questions.

    Attributes:
        name: of the phase.
        done: how much of it is done.
        total: how much there is.
        seconds: that it has taken, in the call that came last to it.
        losses: optimizer steps and mean losses, in order.
    """

    name: str
    done: int = 0
    total: int = 0
    seconds: FiniteFloat = 0.0
    losses: list[tuple[int, FiniteFloat]] = field(default_factory=list)

    def add_loss(self, step: int, loss: float) -> None:
        """Take a loss; those of this step and later ones are of a call that was stopped."""
        self.losses = [point for point in self.losses if point[0] < step] + [(step, loss)]
        if len(self.losses) > MOST_LOSSES:
            self.losses = self.losses[::2]


@dataclass
class StageProgress:
    """A stage and its phases, in the order in which they began."""

    name: str
    phases: list[Phase] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """What its phases have taken."""
        return sum(phase.seconds for phase in self.phases)


@dataclass
class Course:
    """What is kept of a run's progress.

    Attributes:
        stages: of the run, all of them.
        current: index of the stage that is at work, or was last.
        state: whether a call is at work, was stopped, or has come to the end of the run.
    """

    stages: list[StageProgress]
    current: NonNegativeInt = 0
    state: Literal["running", "stopped", "finished"] = "running"


@dataclass(frozen=True)
class Left:
    """Seconds that are left, by what this run has taken so far; None where nothing tells yet.

    Attributes:
        phase: of what is being done.
        stage: of the stage that is at work: what is left of its phase, and what its other phases took a stage ago.
        sequence: of all: each later stage as the last finished one.
    """

    phase: float | None = None
    stage: float | None = None
    sequence: float | None = None


COURSE = TypeAdapter(Course)


class RunProgress:
    """Follows a run by the calls that it makes (`runs.run.Progress`), from where an earlier one stopped.

    Attributes:
        run: its folder.
        course: how far it is.
        phase: what it does; None before it has done anything.
        was_kept: whether an earlier call's progress was found.
    """

    def __init__(self, run: Path, stages: Sequence[str], now: Callable[[], float] = time.monotonic) -> None:
        """For a run folder, which need not exist yet, and the names of its stages; `now` is a clock in seconds."""
        self.run, self._now, self._last = run, now, now()
        self._places = {place(index, stages): index for index in range(len(stages))}
        self.phase: Phase | None = None
        kept = self._kept(stages)
        self.was_kept = kept is not None
        self.course = kept or Course([StageProgress(name) for name in stages])
        self._begun: dict[str, Phase] = {}
        self._where = ""
        self._phase_began = self._last

    def __call__(self, where: str, what: str, done: int, total: int, loss: float | None = None, /) -> None:
        """Move on; calls from places that are no stage of the run, such as rendering, are none of its progress."""
        now, index = self._now(), self._places.get(where)
        if index is not None:
            if where != self._where:
                self._begin_stage(where, index)
            phase = self.phase
            if phase is None or what != phase.name:
                phase = self._begin_phase(self.course.stages[index], what)
            phase.done, phase.total, phase.seconds = done, total, now - self._phase_began
            if loss is not None:
                phase.add_loss(done, loss)
        self._last = now

    @property
    def left(self) -> Left:
        """What is left."""
        phase, stages, current = self.phase, self.course.stages, self.course.current
        if phase is None or not phase.done:
            return Left()
        in_phase = phase.seconds * (phase.total - phase.done) / phase.done
        if not current or not stages[current - 1].phases:
            return Left(in_phase)
        before = stages[current - 1]
        in_stage = in_phase + sum(one.seconds for one in before.phases if one.name not in self._begun)
        return Left(in_phase, in_stage, in_stage + (len(stages) - 1 - current) * before.seconds)

    def keep(self) -> None:
        """Write it into the run folder."""
        write_atomically(self.run / FILE, COURSE.dump_json(self.course))

    def _kept(self, stages: Sequence[str]) -> Course | None:
        try:
            kept = COURSE.validate_json((self.run / FILE).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            kept = None
        if kept is not None and [stage.name for stage in kept.stages] == list(stages) and kept.current < len(stages):
            return kept
        logger.warning("%s is not of this run: what was shown of earlier calls is lost", self.run / FILE)
        return None

    def _begin_stage(self, where: str, index: int) -> None:
        self._where, self.phase, self._begun = where, None, {}
        self.course.current, self.course.state = index, "running"
        for later in self.course.stages[index + 1 :]:  # that were learned once, and taken back
            later.phases.clear()

    def _begin_phase(self, stage: StageProgress, what: str) -> Phase:
        found = next((phase for phase in stage.phases if phase.name == what), None)
        if found is None:
            found = Phase(what)
            stage.phases.append(found)
        # The first call comes when a part of it is done already, so a phase begins where the one before ended; one that
        # comes again in a stage goes on.
        self._phase_began = self._last - (found.seconds if what in self._begun else 0.0)
        self.phase = self._begun[what] = found
        return found


def place(index: int, stages: Sequence[str]) -> str:
    """A stage among those of a run, as people read it: `3/8 imagenet`."""
    return f"{index + 1}/{len(stages)} {stages[index]}"


def clock(seconds: float) -> str:
    """Minutes and seconds as `1:07`; hours before them where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
