"""Any change of any file of a finished run is named in one line by what reads the file, or has no effect at all."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from campaign.children import in_child
from campaign.damage import KINDS, deleted
from campaign.tally import Budget, Tally
from campaign.world import PROGRESS, World, learn, make_world, type_in

COMMANDS = {
    "eval": ("eval", "RUN"),
    "chat": ("chat", "RUN", "--prompt", "Which colour is it?", "--json"),
    "chat --merge": ("chat", "RUN", "--merge", "1", "--prompt", "Which colour is it?", "--json"),
    "report": ("report", "RUN", "--out", "OUT"),
    "rescore": ("rescore", "RUN"),
    "answers export": ("answers", "export", "RUN", "--to", "OUT"),
    "train": ("train", "RECIPE"),
}
EDITS = (
    ("run.json", "recipe.method.experts.alpha", 320.0),
    ("run.json", "recipe.method.locator.layer", 0),
    ("run.json", "recipe.backbone.dtype", "bfloat16"),
    ("run.json", "recipe.data.tasks", ["sides", "colours", "counts"]),
    ("merges/01/merge.json", "bound", 9.0),
    ("manifest.json", "results_sha256", "0" * 64),
    ("results.json", "routes.located.matrix.0.0", 9999.0),
)
"""Edits that people make."""


@dataclass(frozen=True)
class Outcome:
    """What a command did: its status, what it said, and every file that it left in the run and in its own folder."""

    status: int | None
    told: str
    files: dict[str, bytes]


def run(folder: Path, rng: random.Random, budget: Budget, tally: Tally) -> None:
    """Cases are a file, a kind of damage and a command; as many as there is time for."""
    world = make_world(folder)
    finished, other = folder / "finished" / "run", folder / "other" / "run"
    shutil.copytree(world.whole.parent, finished.parent)
    made = [in_child(type_in("merge", finished, "--bound", "1e9", "--rows", "4"))]
    made.append(in_child(lambda: learn(world, other, "seed=1")))
    made.append(in_child(type_in("merge", other, "--bound", "1e9", "--rows", "4")))
    assert all(one.status == 0 for one in made), [one.told for one in made]

    usual = {name: do(world, finished, name, f"usual_{index}") for index, name in enumerate(COMMANDS)}
    assert all(one.status == 0 for one in usual.values()), [one.told for one in usual.values()]
    files = sorted(str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file())
    files = [name for name in files if not name.startswith("logs/")]
    tally.facts["files"] = len(files)

    cases = [(name, kind, command) for name in files for kind in KINDS for command in COMMANDS]
    rng.shuffle(cases)
    for index, (name, key, value) in enumerate(EDITS):
        for command in COMMANDS:
            place = world.case(f"edit_{index}_{command}")
            shutil.copytree(finished, place)
            set_value(place / name, key, value)
            judge(tally, "known edits", f"{name}: {key} is {value}", name, command, usual, do(world, place, command))
    for index, (name, kind, command) in enumerate(cases):
        if not budget.left():
            break
        place = world.case(index)
        shutil.copytree(finished, place)
        if (how := KINDS[kind](place / name, other / name, rng)) is not None:
            judge(tally, kind, f"{name}: {how}", name, command, usual, do(world, place, command))
        shutil.rmtree(place.parent)
    for command in COMMANDS:
        place = world.case(f"gap_{command}")
        shutil.copytree(finished, place)
        for path in (place / "tasks/02_sides").iterdir():
            deleted(path, path, rng)
        (place / "tasks/02_sides").rmdir()
        judge(tally, "a stage gone", "the second of three", "tasks", command, usual, do(world, place, command))


def do(world: World, run: Path, command: str, case: str | None = None) -> Outcome:
    """What a command does on a run; on a copy of it where `case` names one."""
    if case is not None:
        run = Path(shutil.copytree(run, world.case(case)))
    out = run.parent / "out"
    world.write_recipe(run) if command == "train" else None
    named = {"RUN": run, "OUT": out, "RECIPE": run.parent / "recipe.yaml"}
    ended = in_child(type_in(*(named.get(word, word) for word in COMMANDS[command])))
    left = {f"run/{name}": content for name, content in contents(run).items()} | contents(out)
    return Outcome(ended.status, without_places(ended.told, run), left)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but a tracker's, and those that tell times."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    named = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: content for name, content in named.items() if not name.startswith("logs/")}


def without_places(told: str, run: Path) -> str:
    """What was said, wherever the run lies, without bars."""
    lines = told.replace(str(run.parent), "PLACE").splitlines()
    return "\n".join(line for line in lines if "Loading weights" not in line and ", 0:0" not in line)


def set_value(path: Path, key: str, value: object) -> None:
    """Set the value at a dotted key of a JSON file."""
    document = json.loads(path.read_text())
    *outer, last = (int(step) if step.isdigit() else step for step in key.split("."))
    inner = document
    for step in outer:
        inner = inner[step]
    inner[last] = value
    path.chmod(0o644)
    path.write_text(json.dumps(document))


def judge(
    tally: Tally, kind: str, how: str, name: str, command: str, usual: dict[str, Outcome], found: Outcome
) -> None:
    """Count how a command met a damaged file."""
    outcome, broken = verdict(name, usual[command], found)
    tally.add(kind, outcome, f"{command}, {how}: {broken}" if broken else None)


TOLD_ANEW = {"run/manifest.json", *(f"run/{name}" for name in PROGRESS)}
"""Files that two runs of one command leave unlike each other."""


def verdict(name: str, usual: Outcome, found: Outcome) -> tuple[str, str | None]:
    """What became of a change: the outcome, and which promise it broke."""
    names = {name, Path(name).name, Path(name).parent.name} - {"", "."}
    errors = [line for line in found.told.splitlines() if line.startswith("error:")]
    if found.status is None:
        return "hung", "no end"
    if found.status != 0 or "Traceback" in found.told:
        if found.status != 2 or len(errors) != 1 or "Traceback" in found.told:
            return "traceback", f"status {found.status}: {found.told[-700:]}"
        said = any(one in errors[0] for one in names)
        return ("refused by name", None) if said else ("refused without the name", errors[0])
    changed = {
        file
        for file in (usual.files.keys() | found.files.keys()) - TOLD_ANEW
        if usual.files.get(file) != found.files.get(file) and not file.startswith(f"run/{name}")
    }
    if not changed and usual.told == found.told:
        same = usual.files.get(f"run/{name}") == found.files.get(f"run/{name}")
        return ("mended" if same else "without effect"), None
    said = [line for line in found.told.splitlines() if line not in usual.told.splitlines()]
    if any(one in line for line in said for one in names):
        return "said by name, and gone on with", None
    return "SILENT", f"changed {sorted(changed)[:4]}; said {said[:4]}"
