"""Options that are numbers: each has a least and a most, and whatever else is typed is refused in one line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import typer

from llava_cmoe.cli.console import Console, say
from llava_cmoe.settings.base import shown
from llava_cmoe.settings.values import LARGEST

WHOLE = re.compile(r"[+-]?[0-9]{1,40}")
DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,4})?")


@dataclass(frozen=True)
class Number:
    """Reads what is typed behind an option.

    Attributes:
        option: its name, such as `--rows`.
        least: the smallest number that makes sense.
        most: the largest one.
        whole: only integers do.
    """

    option: str
    least: float
    most: float
    whole: bool
    __name__ = "number"  # what typer calls the kind of value

    def __call__(self, typed: object) -> float:
        """The number; or the command ends with status 2 and one line."""
        text = str(typed)
        if (WHOLE if self.whole else DECIMAL).fullmatch(text):
            value: float = int(text) if self.whole else float(text)
            if math.isfinite(value) and self.least <= value <= self.most:
                return value
        kind = "a whole number" if self.whole else "a number"
        reason = f"{self.option}: expected {kind} from {self.least:,} to {self.most:,}, got {shown(text)}"
        say(Console(stderr=True), "error:", reason, "bold red")
        raise typer.Exit(2)


def whole(option: str, help: str, least: int, most: int = LARGEST) -> Any:
    """An option that is a whole number."""
    return typer.Option(option, help=help, parser=Number(option, least, most, whole=True), metavar="N")


def decimal(option: str, help: str, least: float, most: float) -> Any:
    """An option that is a finite number."""
    return typer.Option(option, help=help, parser=Number(option, least, most, whole=False), metavar="X")
