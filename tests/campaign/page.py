"""docs/reliability.md from the figures of the campaign: what is promised, what is not, and what was counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INTRODUCTION = Path(__file__).with_name("promises.md")

TITLES = {
    "kills": "Kills, power cuts, signals, full disks",
    "corruption": "Damaged runs",
    "inputs": "Mutated inputs",
    "security": "Attacks",
    "mistakes": "Mistakes of a user",
}


def write_page(figures: Path, page: Path) -> None:
    """Write the page of a file of figures."""
    page.write_text(reliability_page(json.loads(figures.read_text())), encoding="utf-8")


def reliability_page(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The page: promises, then a section a part, of all its seeds together."""
    parts = [INTRODUCTION.read_text(), "## What was counted"]
    for name, title in TITLES.items():
        if seeds := figures.get(name):
            parts += [f"### {title}", _told(name, seeds), _table(seeds)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _told(name: str, seeds: Mapping[str, Any]) -> str:
    cases, broken = sum(_counts(seeds).values()), sum(one["num_broken"] for one in seeds.values())
    words = [f"{cases:,} cases, seed{'s' if len(seeds) > 1 else ''} {', '.join(sorted(seeds, key=int))}"]
    if name == "kills":
        some = next(iter(seeds.values()))
        seen = {number for one in seeds.values() for number in one["crashed_at"]}
        words.append(
            f"a run of {some['stages']} stages makes {some['file_operations']} operations on its folder, and "
            f"{len(seen)} of them were the last one of some run"
        )
    if name == "corruption":
        words.append(f"a run has {next(iter(seeds.values()))['files']} files")
    words.append(f"promises broken: {broken}")
    return f"*{'; '.join(words)}.*"


def _table(seeds: Mapping[str, Any]) -> str:
    counts = _counts(seeds)
    kinds, outcomes = sorted({kind for kind, _ in counts}), sorted({outcome for _, outcome in counts})
    if len(kinds) > 30:  # a case each
        return "\n".join(f"- {kind}: {next(one for one in outcomes if counts[kind, one])}" for kind in kinds)
    rows = [["", *outcomes], ["---", *("---:" for _ in outcomes)]]
    rows += [[kind, *(f"{counts[kind, one]:,}" if counts[kind, one] else "" for one in outcomes)] for kind in kinds]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _counts(seeds: Mapping[str, Any]) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for one in seeds.values():
        for kind, outcomes in one["counts"].items():
            for outcome, number in outcomes.items():
                total[kind, outcome] += number
    return total
