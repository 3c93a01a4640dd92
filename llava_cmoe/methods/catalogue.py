"""All methods side by side: what each does, trains, stores and costs to answer, and the engines that it runs under."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from pydantic import TypeAdapter

from llava_cmoe.methods import METHODS
from llava_cmoe.settings.methods import MethodSettings

ENGINES = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
"""What spreads training over processes, by DeepSpeed's stage."""


@dataclass(frozen=True)
class Card:
    """What there is to know of a method before choosing it.

    Attributes:
        name: as a recipe gives it.
        does: the first sentence of its file, with its paper.
        trained: parameters that a task trains, as a formula.
        stored: what a task's directory holds.
        answer: what an answer computes beyond the base model.
        engines: those that its default settings run under, besides a single process.
    """

    name: str
    does: str
    trained: str
    stored: str
    answer: str
    engines: tuple[str, ...]


def catalogue() -> list[Card]:
    """A card for each method, in the order of the table that finds them."""
    cards = []
    for name, method in METHODS.items():
        settings = TypeAdapter(MethodSettings).validate_python({"name": name})
        does = (sys.modules[method.__module__].__doc__ or "").splitlines()[0]
        engines = tuple(engine for engine, stage in ENGINES.items() if method.refusal(settings, stage) is None)
        cards.append(Card(name, does, method.costs.trained, method.costs.stored, method.costs.answer, engines))
    return cards


def markdown(cards: list[Card]) -> str:
    """The cards as a table for the page on methods, each linked to its section."""
    lines = [
        "| method | trained per task | stored per task | an answer costs | engines |",
        "| --- | --- | --- | --- | --- |",
    ]
    for card in cards:
        engines = "all" if len(card.engines) == len(ENGINES) else ", ".join(card.engines)
        cells = f"[`{card.name}`](#{card.name})", card.trained, card.stored, card.answer, engines
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
