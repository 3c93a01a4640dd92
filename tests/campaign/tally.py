"""What a part of the campaign counted: cases by kind and outcome, and each case that broke a promise, spelled out."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUM_TOLD = 40
"""Broken promises that are spelled out."""


@dataclass
class Tally:
    """Counts of one part.

    Attributes:
        counts: kind to outcome to number of cases.
        facts: further numbers, such as how many operations there are.
        broken: cases that broke a promise.
    """

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    facts: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, kind: str, outcome: str, broken: str | None = None) -> None:
        """Count a case; `broken` says how it broke a promise, if it did."""
        self.counts[kind][outcome] += 1
        if broken is not None:
            self.broken.append(f"{kind}: {broken}")
            print(f"BROKEN {kind}: {broken}", flush=True)

    def as_json(self) -> dict[str, Any]:
        """What is written down."""
        counts = {kind: dict(sorted(outcomes.items())) for kind, outcomes in sorted(self.counts.items())}
        return {**self.facts, "counts": counts, "num_broken": len(self.broken), "broken": self.broken[:NUM_TOLD]}


class Budget:
    """Time that a part may take."""

    def __init__(self, minutes: float) -> None:
        self._began, self._seconds = time.monotonic(), 60 * minutes

    def left(self, share: float = 1.0) -> bool:
        """Whether less than this share of it was used."""
        return time.monotonic() - self._began < share * self._seconds


def write_part(path: Path, part: str, seed: int, figures: dict[str, Any]) -> None:
    """Put one part's figures into the file of all parts, beside those of other seeds: what one misses another finds."""
    document = json.loads(path.read_text()) if path.exists() else {}
    document.setdefault(part, {})[str(seed)] = figures
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
