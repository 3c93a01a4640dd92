"""Published numbers as data, with their sources: what a comparison may put beside runs.

Means and BWT are taken from the numbers by `metrics.py`, so that one definition serves all columns; published means
are kept only where the numbers behind them were not published, and to be tested against.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from llava_cmoe.evaluation.metrics import DEFINITIONS, Matrix, all_metrics
from llava_cmoe.settings.base import RecipeError, Settings
from llava_cmoe.settings.recipes import nearest, parse_settings, read_yaml

FILE = Path(__file__).with_name("published_results.yaml")


class PublishedRow(Settings):
    """One method of a published table, in percent."""

    immediate: tuple[float, ...] = ()
    """Each task right after learning it."""
    last: tuple[float, ...] = ()
    """Each task after the last one."""
    stages: tuple[tuple[float, ...], ...] = ()
    """Per task: after its own stage, then after each later one."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Metrics as published, by their names in `metrics.py`."""
    note: str = ""
    """What the row must not be read without."""

    @model_validator(mode="after")
    def _known_metrics(self) -> PublishedRow:
        for name in self.metrics:
            if name not in DEFINITIONS:
                raise ValueError(f"unknown metric {name}")
        return self

    def matrix(self) -> Matrix:
        """The accuracy matrix as far as it was published; empty where only metrics were."""
        if self.stages:
            return [[self.stages[i][j - i] for i in range(j + 1)] for j in range(len(self.stages))]
        rows: list[list[float | None]] = [[None] * i + [value] for i, value in enumerate(self.immediate)]
        rows = rows or [[] for _ in self.last]
        return [*rows[:-1], list(self.last)] if self.last else []

    def all_metrics(self) -> dict[str, float | None]:
        """Every metric: computed where the numbers are published, else as published."""
        computed = all_metrics(self.matrix())
        return {name: self.metrics.get(name) if value is None else value for name, value in computed.items()}


class PublishedSet(Settings):
    """One published table."""

    title: str
    """What was measured."""
    source: str
    """Where it was published."""
    base: str
    """The model that learning began from."""
    protocol: str
    """Rules by which answers were scored."""
    samples: dict[str, int] = Field(default_factory=dict)
    """Questions per task, where known."""
    tasks: tuple[str, ...] = ()
    """The tasks in the order in which they are learned; none where only means were published."""
    rows: dict[str, PublishedRow]
    """Method to its numbers."""
    facts: dict[str, float | str] = Field(default_factory=dict)
    """What was stated besides, in the words of the source."""

    @model_validator(mode="after")
    def _as_long_as_tasks(self) -> PublishedSet:
        for name, row in self.rows.items():
            for numbers in (row.immediate, row.last, row.stages):
                if len(numbers) not in (0, len(self.tasks)):
                    raise ValueError(f"{name} has {len(numbers)} numbers for {len(self.tasks)} tasks")
        return self


def published_sets() -> dict[str, PublishedSet]:
    """Every table, by name."""
    return {name: parse_settings(PublishedSet, found, f"{FILE}: {name}") for name, found in read_yaml(FILE).items()}


def published(name: str) -> PublishedSet:
    """The table of this name.

    Raises:
        RecipeError: no such table (tells the nearest name), or one without rows to compare with.
    """
    sets = published_sets()
    if name not in sets:
        raise RecipeError(
            f"unknown published results {name}; did you mean {nearest(name, sets)}? There are: {', '.join(sets)}"
        )
    if not sets[name].rows:
        raise RecipeError(f"{name}: nothing there can stand in a table; it states {sets[name].facts}")
    return sets[name]
