"""What a stranger's files try: code, other files, addresses, secrets, the terminal. None of it may come about.

A stranger knows how hashes are made, so what is forged here is sealed anew. Each attack runs in a child that notes
whatever the process does outside the places that it was given.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaign import attacks
from campaign.children import Ended, in_child
from campaign.tally import Budget, Tally
from campaign.world import World, make_world, type_in

SECRETS = {"OPENAI_API_KEY": "sk-canary-1", "HF_TOKEN": "hf_canary_2", "WANDB_API_KEY": "canary3wandb"}
MARKER = "was_here"
COMMANDS = {
    "eval": ("eval", "RUN"),
    "chat": ("chat", "RUN", "--prompt", "Which colour is it?"),
    "chat --merge": ("chat", "RUN", "--merge", "1", "--prompt", "Which colour is it?"),
    "report": ("report", "RUN", "--out", "OUT"),
    "rescore": ("rescore", "RUN"),
    "compare": ("compare", "RUN", "RUN", "--out", "OUT"),
    "export": ("answers", "export", "RUN", "--to", "OUT"),
    "train": ("train", "RECIPE"),
    "check": ("data", "check", "SEQUENCE", "--root", "DATA", "--backbone", "BACKBONE", "--processes", "1"),
}


def run(folder: Path, rng: random.Random, budget: Budget, tally: Tally) -> None:
    """Every attack, by every command that it aims at."""
    world = make_world(folder)
    merged = in_child(type_in("merge", world.whole, "--bound", "1e9", "--rows", "4"))
    assert merged.status == 0, merged.told
    cases = [(name, *case) for name, prepared in attacks.ATTACKS.items() for case in prepared]
    rng.shuffle(cases)
    for index, (kind, what, commands, attack) in enumerate(cases):
        for command in commands:
            if not budget.left():
                tally.add(kind, "left out, no time")
                continue
            place = folder / "attacks" / f"{index}_{command.replace(' ', '_')}"
            ended = attempt(world, place, command, attack)
            outcome, broken = verdict(place, ended)
            tally.add(kind, outcome, f"{command}, {what}: {broken}" if broken else None)
            shutil.rmtree(place, ignore_errors=True)


def attempt(world: World, place: Path, command: str, attack: Callable[[Path], Path | None]) -> Ended:
    """Give a command a stranger's files."""
    place.mkdir(parents=True)
    shutil.copytree(world.whole, place / "run")
    shutil.copytree(world.data, place / "data")
    shutil.copytree(world.backbone, place / "backbone")
    (place / "outside").mkdir()
    (place / "outside/secret.json").write_text(json.dumps({"secret": "canary4outside"}))
    recipe = json.loads((world.whole.parent / "recipe.yaml").read_text())
    run = attack(place) or place / "run"
    recipe |= {"run": str(run)}
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    named = {"RUN": run, "OUT": place / "out", "RECIPE": place / "recipe.yaml", "DATA": place / "data",
             "SEQUENCE": place / "data/sequence.yaml", "BACKBONE": place / "backbone"}  # fmt: skip
    words = [named.get(word, word) for word in COMMANDS[command]]
    before = snapshot(place / "outside")

    def watched() -> None:
        os.environ.update(SECRETS)
        os.chdir(place / "outside")
        _watch(place)
        type_in(*words)()

    ended = in_child(watched)
    if snapshot(place / "outside") != before:
        (place / "noted").open("a").write("something outside was written\n")
    return ended


def _watch(place: Path) -> None:
    """Note connections, shells, pickles, and files that are opened outside, or written beside the run and `--out`."""
    noted = (place / "noted").open("a")
    allowed = tuple(f"{place}/{name}" for name in ("run", "out", ".out.partial", "[", "b", "\x1b"))
    outside = f"{place}/outside"

    def heard(event: str, args: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "os.system", "pickle.find_class"):
            if event == "socket.connect" and not isinstance(args[1], tuple):
                return  # of this machine, such as a log's
            noted.write(f"{event} {args[1:]}\n")
            noted.flush()
        if event == "open" and isinstance(args[0], (str, bytes)) and isinstance(args[2], int):
            if not os.path.isabs(args[0]):
                return  # below a folder that is open, or where the command was typed, which is looked at in the end
            path = os.path.realpath(os.fsdecode(args[0]))
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            strange = path.startswith(str(place)) and not path.startswith(allowed) if writes else False
            if strange or path.startswith(outside):
                noted.write(f"{'written' if writes else 'read'}: {path}\n")
                noted.flush()

    sys.addaudithook(heard)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def verdict(place: Path, ended: Ended) -> tuple[str, str | None]:
    """What became of an attack, and what it reached."""
    noted = (place / "noted").read_text() if (place / "noted").exists() else ""
    if noted:
        return "REACHED OUT", noted[:500]
    if list(place.rglob(f"*{MARKER}*")):
        return "CODE RAN", "the marker was made"
    if ended.status is None:
        return "hung", ended.told[-300:]
    if ended.status not in (0, 1, 2) or "Traceback" in ended.told:
        return "traceback", ended.told[-500:]
    if any(one in ended.told for one in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\rerror")):
        return "TERMINAL", repr(ended.told[-300:])
    written = [path for path in (*place.glob("run/**/*"), *place.glob("out/**/*"))]
    written = [path for path in written if path.is_file() and not path.is_symlink()]
    for name, secret in (*SECRETS.items(), ("a file outside", "canary4outside")):
        holders = [path.name for path in written if secret.encode() in path.read_bytes()]
        if secret in ended.told or holders:
            return "SECRET TOLD", f"{name} in {holders or 'what is printed'}"
    for page in place.glob("out/*.html"):
        if any(one in page.read_text() for one in ("<script>canary", "<img src=x")):
            return "SCRIPT", page.name
    return "refused" if ended.status in (1, 2) else "without effect", None
