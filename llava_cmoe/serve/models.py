"""The names that a request may give as its model, and what each of them stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_cmoe.chat.opening import LearnedRun

BASE = "base"
"""Behind a run's name: its model without experts."""


@dataclass(frozen=True)
class Offered:
    """What a name stands for.

    Attributes:
        run: the name of the run, or of an earlier state of it, that answers.
        learned: that run.
        task: index of the task whose routers answer, -1 for the base model; None if it is to be located, or if the run
            answers alike for all tasks.
    """

    run: str
    learned: LearnedRun
    task: int | None

    @property
    def facts(self) -> dict[str, Any]:
        """What the list of models says of it, beside OpenAI's fields."""
        route, task = ("located" if self.learned.method.locates else None), None
        if self.task is not None:
            route, task = ("oracle", self.learned.names[self.task]) if self.task >= 0 else (BASE, None)
        return {"run": self.run, "stages": list(self.learned.names), "route": route, "task": task}


def offered_models(runs: Mapping[str, LearnedRun]) -> dict[str, Offered]:
    """Every name: those of the runs, and behind a colon those of their tasks and `base`.

    Without a locator a task makes no difference, so only the run is offered.
    """
    return {
        f"{run}:{task}" if task else run: Offered(run, learned, index)
        for run, learned in runs.items()
        for task, index in _tasks(learned).items()
    }


def _tasks(learned: LearnedRun) -> dict[str, int | None]:
    if not learned.method.locates:
        return {"": None}
    tasks: dict[str, int | None] = {"": None, **{task: index for index, task in enumerate(learned.names)}}
    return {**tasks, BASE: tasks.get(BASE, -1)}
