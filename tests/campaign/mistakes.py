"""Mistakes of a user, as data: each is answered in one line with the fix, before a model loads where none is needed."""

from __future__ import annotations

import json
import random
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from campaign.children import in_child
from campaign.tally import Budget, Tally
from campaign.world import World, make_world, type_in

Edit = tuple[str, Any, Any]
"""A file, a dotted key in it (empty for all of it) and what stands there."""


@dataclass(frozen=True)
class Mistake:
    """An entry of mistakes.yaml."""

    what: str
    typed: str
    says: str
    edits: tuple[Edit, ...] = ()


MISTAKES = tuple(
    Mistake(**{**one, "edits": tuple(map(tuple, one.get("edits", ())))})
    for one in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
)
LONG = "<image>\n" + "a " * 3000
"""What stands for LONG in an edit."""


def run(folder: Path, rng: random.Random, budget: Budget, tally: Tally) -> None:
    """All of them."""
    world = make_world(folder)
    tally.facts["mistakes"] = len(MISTAKES)
    for index, mistake in enumerate(MISTAKES):
        outcome, broken = make(world, mistake, folder / "mistakes" / str(index))
        tally.add(mistake.what, outcome, broken)


def make(world: World, mistake: Mistake, place: Path) -> tuple[str, str | None]:
    """Make one, in a copy of everything; returns the outcome, and what is wrong with the answer."""
    shutil.copytree(world.data, place / "data")
    shutil.copytree(world.whole.parent, place, dirs_exist_ok=True)
    (place / "empty").mkdir()
    recipe = json.loads((place / "recipe.yaml").read_text())
    recipe["data"] |= {"root": str(place / "data"), "sequence": str(place / "data/sequence.yaml")}
    recipe["run"] = str(place / "run")
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    for name, key, value in mistake.edits:
        change(place / name, key, LONG if value == "LONG" else value)
    named = {"RECIPE": place / "recipe.yaml", "RUN": place / "run", "FOLDER": place / "empty"}
    words = [_filled(word, named) for word in shlex.split(mistake.typed)]

    def typed() -> None:
        from llava_cmoe.backbones import loading

        def refuse(*_: Any) -> None:
            raise AssertionError("a model was loaded")

        loading._load_model = refuse  # type: ignore[assignment]
        type_in(*words)()

    ended = in_child(typed)
    told = _unfilled(ended.told, named)
    lines = [line for line in told.splitlines() if line.strip() and "Loading weights" not in line]
    of_grammar = any(line.startswith("Usage: ") for line in lines)
    if ended.status in (0, None) or "Traceback" in told:
        return "broken", f"{mistake.typed}: status {ended.status}: {told[-500:]}"
    if mistake.says not in " ".join(told.replace("│", " ").split()):
        return "broken", f"{mistake.typed}: does not say {mistake.says!r}: {told[-500:]}"
    errors = [line for line in lines if line.startswith("error: ")]
    if not of_grammar and (len(errors) != 1 or len(lines) > 2 or len(errors[0]) > 700):
        return "broken", f"{mistake.typed}: not one line: {told[-500:]}"
    return "the command's usage and one sentence" if of_grammar else "one line", None


def change(path: Path, key: str, value: Any) -> None:
    """Set what stands at a key, or be all of the file; None deletes it."""
    if key == "":
        path.unlink() if value is None else path.write_text(value)
        return
    document = json.loads(path.read_text())
    *outer, last = (int(step) if step.isdigit() else step for step in key.split("."))
    inner = document
    for step in outer:
        inner = inner[step]
    inner[last] = value
    path.write_text(json.dumps(document))


def _filled(word: str, named: dict[str, Path]) -> str:
    for name, path in named.items():
        word = word.replace(name, str(path))
    return word


def _unfilled(told: str, named: dict[str, Path]) -> str:
    for name, path in named.items():
        told = told.replace(str(path), name)
    return told
