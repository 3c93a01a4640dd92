"""Mutated inputs of every kind: each is refused in a line that names it, or read whole; none hangs, none is silent."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from campaign.tally import Budget, Tally
from campaign.workers import Verdict, in_workers
from campaign.world import World, make_world

WEIGHTS = {
    **{"rows": 8, "annotations": 4, "pictures": 4, "recipes": 5, "numbers": 4, "sequences": 4},
    **{"stored": 4, "imported": 2, "scored": 3, "questions": 3, "files": 2, "templates": 0.06},
}
"""How often a kind is drawn: by what it costs and by how much there is to change."""


def run(folder: Path, rng: random.Random, budget: Budget, tally: Tally) -> None:
    """As many cases as there is time for."""
    world = make_world(folder)
    seed, made = rng.random(), dict[int, dict[str, Callable[[random.Random], Verdict]]]()

    def kind_of(number: int) -> str:
        return random.Random(f"{seed}/{number}").choices([*WEIGHTS], [*WEIGHTS.values()])[0]

    def attempt(number: int) -> Verdict:
        if os.getpid() not in made:  # in each worker anew
            made[os.getpid()] = makers(folder / f"worker_{os.getpid()}", world)
        return made[os.getpid()][kind_of(number)](random.Random(f"{number}/{seed}"))

    for kind, outcome, broken in in_workers(kind_of, attempt, budget.left):
        tally.add(kind, outcome, broken)
    tally.facts["mutations"] = sum(sum(outcomes.values()) for outcomes in tally.counts.values())


def makers(place: Path, world: World) -> dict[str, Callable[[random.Random], Verdict]]:
    """By its name, what makes and judges a case of a kind."""
    from campaign.of_answers import Answers
    from campaign.of_backbones import Backbones
    from campaign.of_rows import Rows
    from campaign.of_settings import SettingsFiles

    of = (Rows(place, world.backbone), SettingsFiles(place, world), Answers(place, world), Backbones(place, world))
    return {name: getattr(one, name) for name in WEIGHTS for one in of if hasattr(type(one), name)}
