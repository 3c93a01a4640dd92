"""What can be wrong with a data root: a file, a row of it, and the reason.

Finding problems is the job of `coin.py`, `images.py` and `encoding.py`; listing all of them is `check.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One thing wrong in one file.

    Attributes:
        file: the file that has to be mended.
        reason: what is wrong with it.
        row: index in the JSON array (from 0), where one row is to blame.
        row_id: the row's id, where it has one.
    """

    file: Path
    reason: str
    row: int | None = None
    row_id: str | None = None

    def __str__(self) -> str:
        where = "" if self.row is None else f", row {self.row}"
        named = "" if self.row_id is None else f" (id {self.row_id})"
        return f"{self.file}{where}{named}: {self.reason}"


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the row and the reason."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Unusable(ValueError):
    """A row that cannot be used, for the reason given."""


class LostForGood(Exception):
    """A row whose picture is known to be lost everywhere."""
