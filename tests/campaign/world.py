"""What every part of the campaign works on: a tiny backbone, three tiny tasks, and a run that nobody disturbed."""

from __future__ import annotations

import filecmp
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from campaign.children import in_child

TASKS = ("colours", "sides", "counts")
QUICK = (
    *("training.checkpoint_steps=5", "data.train_rows=16", "method.locator.epochs=4"),
    *("evaluation.routes=[located,oracle]", "data.eval_rows=5"),
)
"""Few steps and questions: what counts here is how often files are touched, not what is learned."""


@dataclass(frozen=True)
class World:
    """Folders that all cases share; `whole` is a finished run of three stages."""

    folder: Path

    @property
    def data(self) -> Path:
        """Data root."""
        return self.folder / "data"

    @property
    def backbone(self) -> Path:
        """Of `tiny_model`."""
        return self.folder / "backbone"

    @property
    def whole(self) -> Path:
        """The undisturbed run."""
        return self.folder / "whole" / "run"

    def case(self, number: int | str) -> Path:
        """Where a case's run goes; results tell the folder's name, which is the same for all."""
        return self.folder / "cases" / str(number) / "run"

    def write_recipe(self, run: Path, *overrides: str) -> Any:
        """A recipe for `run` beside it, as `tiny.recipe` makes one; returns it resolved."""
        import tiny

        recipe = tiny.recipe(run, self.data, self.backbone, "cmoe", *QUICK, *overrides)
        (run.parent / "recipe.yaml").write_text(recipe.model_dump_json())
        return recipe


def make_world(folder: Path) -> World:
    """Fill a folder, and import here whatever a run and the commands on it import: all in children, to fork cheaply."""
    world = World(folder)

    def made() -> list[str]:
        import tiny
        from tiny_model import make_backbone, make_processor

        before = set(sys.modules)
        make_backbone(world.backbone, make_processor())
        tiny.write_data(world.data, TASKS)
        learn(world, world.whole)
        copy = shutil.copytree(world.whole, world.case("imports"))
        for words in (("report", copy), ("chat", copy, "--prompt", "x"), ("eval", copy)):
            with suppress(SystemExit):
                type_in(*words)()
        return sorted(set(sys.modules) - before)

    ended = in_child(made, seconds=1800)  # of a busy machine
    assert ended.status == 0, ended.told
    for name in ended.value:
        with suppress(ImportError):
            import_module(name)
    gc.freeze()  # each fit collects garbage twice, and would look through all that is imported
    return world


def learn(world: World, run: Path, *overrides: str) -> None:
    """Learn a run, or go on with it, in this process."""
    import torch

    from llava_cmoe.sequence import learn as learned

    torch.set_num_threads(1)
    learned(world.write_recipe(run, *overrides))


def type_in(*words: object) -> Callable[[], None]:
    """A case that is a command; its status is that of the case."""

    def typed() -> None:
        import torch

        from llava_cmoe.cli import main

        torch.set_num_threads(1)
        os.environ["COLUMNS"] = "200"
        sys.argv[:] = ["llava-cmoe", *map(str, words)]
        main()

    return typed


PROGRESS = frozenset({"progress.html", "progress.json"})
"""Of a run folder: they tell times, so no two runs have the same."""


def names_in(run: Path) -> set[str]:
    """Every path in a run folder, but those of a tracker and of its progress."""
    found = (str(path.relative_to(run)) for path in run.rglob("*"))
    return {name for name in found if not name.startswith("logs")} - PROGRESS


def differences(run: Path, whole: Path) -> Iterator[str]:
    """What a run that was disturbed has else than one that was not: tensors, answers, results, or files left behind."""
    from llava_cmoe.evaluation.log import comparable, read_results

    names, wanted = names_in(run), names_in(whole)
    yield from (f"{name} is left behind" for name in sorted(names - wanted))
    yield from (f"{name} is missing" for name in sorted(wanted - names))
    for name in sorted(names & wanted):
        same_bytes = name.endswith(".safetensors") or name.startswith("answers/")
        if same_bytes and (whole / name).is_file() and not filecmp.cmp(run / name, whole / name, shallow=False):
            yield f"{name} differs"
    results = (read_results(folder / "results.json") for folder in (run, whole))
    if len({str(comparable(one)) for one in results}) != 1:
        yield "results.json differs"
