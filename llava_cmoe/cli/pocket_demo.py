"""The demo: the pocket sequence learned three times on a small budget: forgetting, and twice not forgetting.

All are ordinary runs of the shipped recipes with fewer rows, so whatever works here works there. A killed demo
goes on where it was; a finished one is only read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from llava_cmoe.evaluation.log import Results
from llava_cmoe.pocket.root import make_pocket_root
from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.report.figures import draw_matrices
from llava_cmoe.runs.run import Progress
from llava_cmoe.sequence import learn
from llava_cmoe.settings.evaluation import EvaluationSettings
from llava_cmoe.settings.recipes import load_recipe, shipped
from llava_cmoe.settings.run import Recipe

ALL = TypeAdapter(dict[str, Results])
"""What the demo's `results.json` holds: results by the name of the run."""

RECIPES = {
    "sequential_lora": "train/recipes/pocket_sequential_lora.yaml",
    "lora_per_task": "train/recipes/pocket_lora_per_task.yaml",
    "cmoe": "train/recipes/pocket_cmoe.yaml",
}


@dataclass(frozen=True)
class DemoSize:
    """How much the demo learns and asks; meant to take at most 12 minutes on 2 cores."""

    train_rows: int = 300
    test_rows: int = 40
    epochs: float = 3


def run_demo(
    folder: Path, progress: Progress, size: DemoSize | None = None, overrides: Iterable[str] = ()
) -> dict[str, Results]:
    """Render, learn, draw `matrix.png`, and write `results.json` last: where it is, the demo is finished.

    Args:
        folder: gets `data/`, a run folder per method, and the results.
        progress: called after every step.
        size: how much is learned.
        overrides: of the recipes' settings.
    """
    finished = folder / "results.json"
    if finished.exists():
        return ALL.validate_json(finished.read_bytes())
    size = size or DemoSize()
    data = folder / "data"
    if not data.exists():
        make_pocket_root(data, partial(progress, "rendering"), train_rows=size.train_rows, test_rows=size.test_rows)
    learned = {}
    for name in RECIPES:
        learned[name] = learn(demo_recipe(name, folder, size, overrides), _named(progress, name))
    draw_matrices(list(learned.values()), folder / "matrix.png")
    write_atomically(finished, ALL.dump_json(learned, indent=2) + b"\n")
    return learned


def demo_recipe(name: str, folder: Path, size: DemoSize, overrides: Iterable[str] = ()) -> Recipe:
    """A shipped recipe with the demo's folder and size."""
    recipe = load_recipe(shipped(RECIPES[name]), overrides)
    return recipe.model_copy(
        update={
            "run": folder / name,
            "data": recipe.data.model_copy(update={"root": folder / "data"}),
            "training": recipe.training.model_copy(update={"epochs": size.epochs}),
            "evaluation": EvaluationSettings(batch_size=recipe.evaluation.batch_size, routes=("located",)),
        }
    )


def _named(progress: Progress, run: str) -> Progress:
    def named(where: str, what: str, done: int, total: int, loss: float | None = None, /) -> None:
        progress(f"{run} {where}", what, done, total, loss)

    return named
