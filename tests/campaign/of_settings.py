"""Recipes and sequences: what is accepted says what the file says, and every number has bounds."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from campaign.damage import places
from campaign.mutations import NUMBERS, damaged, mutated, written
from campaign.workers import Verdict, meet
from campaign.world import World


class SettingsFiles:
    """A recipe of every method and a sequence, mutated."""

    def __init__(self, folder: Path, world: World) -> None:
        import tiny

        self.folder, self.world = folder / "settings", world
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipes_of = []
        for method in tiny.METHODS:
            recipe = tiny.recipe(self.folder / method / "run", world.data, world.backbone, method)
            self.recipes_of.append(recipe.model_dump(mode="json"))

    def recipes(self, rng: random.Random) -> Verdict:
        """One change of a recipe or of its text."""
        from llava_cmoe.settings.recipes import load_recipe

        document = rng.choice(self.recipes_of)
        path = self.folder / "recipe.yaml"
        if rng.random() < 0.7:
            document, how = mutated(document, rng)
            content = written(document, rng)
        else:
            content, how = damaged(written(document, rng), rng)
        path.write_bytes(content)
        met = meet(lambda: load_recipe(path))
        if fault := met.faults(path):
            return "recipes", met.outcome if met.outcome == "traceback" else "not in one line", f"{how}: {fault}"
        if met.outcome == "refused":
            return "recipes", "refused", None
        lost = _unlike(content, met.value.model_dump(mode="json"), aside=met.value)
        return ("recipes", "SILENT", f"{how}: {lost}") if lost else ("recipes", "accepted whole", None)

    def numbers(self, rng: random.Random) -> Verdict:
        """One number of a recipe at an extreme, given as an override: finite, of its kind, and bounded."""
        from llava_cmoe.settings.recipes import override

        document = rng.choice(self.recipes_of)
        numeric = [place for place in places(document) if _is_number(_at(document, place))]
        place, value = rng.choice(numeric), rng.choice((*NUMBERS, True, False, "12:30:45", "1_0", "0x10", "[1]", "~"))
        text = value if isinstance(value, str) else _yaml_of(value)
        given = f"{'.'.join(map(str, place))}={text}"
        if any(isinstance(step, int) for step in place):
            return "numbers", "left out, a list's", None
        met = meet(lambda: override(json.loads(json.dumps(document)), [given], "recipe"))
        if fault := met.faults(place[-1]):
            return "numbers", met.outcome if met.outcome == "traceback" else "not in one line", f"{given}: {fault}"
        if met.outcome == "refused":
            return "numbers", "refused", None
        found = _at(met.value.model_dump(mode="json"), place)
        if found is None and value == "~":
            return "numbers", "accepted whole", None
        wrong = not _is_number(found) or not math.isfinite(found) or abs(found) > 2**63 or isinstance(value, bool)
        if wrong or (not isinstance(value, str) and found != value):
            return "numbers", "SILENT", f"{given} is read as {found!r}"
        return "numbers", "accepted whole", None

    def sequences(self, rng: random.Random) -> Verdict:
        """One change of a sequence, or of its text."""
        from llava_cmoe.data.sequences import load_sequence

        task = {
            **{"name": "t", "train": "t/train.json", "evaluate": ["t/test.json", "t/val.json"], "scorer": "gqa"},
            **{"max_new_tokens": 3, "geometry": "crop", "instruction": "Answer.", "published": {"train": 4}},
            **{"images": "pictures", "annotations": "a.json", "lost": ["b.png"], "notes": ["guess: c"], "version": 2},
        }
        document: Any = {
            "name": "one",
            "tasks": [task, {**task, "name": "u"}],
            "sources": [{"name": "S", "holds": "d"}],
        }
        path = self.folder / "sequence.yaml"
        if rng.random() < 0.7:
            document, how = mutated(document, rng)
            content = written(document, rng)
        else:
            content, how = damaged(written(document, rng), rng)
        path.write_bytes(content)
        met = meet(lambda: load_sequence(str(path)))
        if fault := met.faults(path):
            return "sequences", met.outcome if met.outcome == "traceback" else "not in one line", f"{how}: {fault}"
        if met.outcome == "refused":
            return "sequences", "refused", None
        lost = _unlike(content, met.value.model_dump(mode="json"), aside=met.value)
        return ("sequences", "SILENT", f"{how}: {lost}") if lost else ("sequences", "accepted whole", None)


def _unlike(content: bytes, read: dict[str, Any], aside: Any) -> str | None:
    """Where a document and what was made of it say different things."""
    import yaml

    try:
        document = yaml.safe_load(content.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return f"no YAML is accepted ({type(error).__name__})"
    return next(_differences(document, read), None)


def _differences(said: Any, read: Any, place: str = "") -> Iterator[str]:
    if isinstance(said, Mapping) and isinstance(read, Mapping):
        for key, value in said.items():
            if key in ("defaults", "tasks_of", "order", "changes"):
                continue
            if str(key) not in read:
                yield f"{place}{key} is dropped"
            else:
                yield from _differences(value, read[str(key)], f"{place}{key}.")
    elif isinstance(said, list) and isinstance(read, list):
        if len(said) != len(read):
            yield f"{place} has {len(said)} entries, {len(read)} are read"
        for number, pair in enumerate(zip(said, read, strict=False)):
            yield from _differences(*pair, f"{place}{number}.")
    elif isinstance(read, list):  # one for a list of one
        yield from _differences([said], read, place)
    elif not _same(said, read):
        yield f"{place} is {str(said)[:60]!r}, read as {str(read)[:60]!r}"


def _same(said: Any, read: Any) -> bool:
    if isinstance(said, str) and _is_number(read) and "_" in said:
        return float(said.replace("_", "")) == read  # as Python and YAML write large numbers
    if _is_number(said) and _is_number(read):
        return float(said) == float(read)
    return isinstance(said, bool) == isinstance(read, bool) and (said == read or str(said) == str(read))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _at(document: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        document = document[step]
    return document


def _yaml_of(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return json.dumps(value)
