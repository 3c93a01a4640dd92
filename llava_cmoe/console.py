"""What every command says: results, problems, and one clear message for a user's mistake.

Which commands there are, and what they do, is `cli.py`'s. Imports wait until they are needed, as they do there.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

from llava_cmoe.settings import RecipeError

if TYPE_CHECKING:
    from llava_cmoe.data.problems import Problem
    from llava_cmoe.evaluation.log import Results

NUM_LISTED = 20
"""Problems that are spelled out; a data root that is wrong in one way has thousands of them."""


@contextmanager
def plainly() -> Iterator[None]:
    """Keep other libraries' chatter off the screen; a user's mistake becomes one message and exit status 2."""
    _hush()
    from transformers.utils.logging import disable_progress_bar

    from llava_cmoe.backbones.loading import BackboneError
    from llava_cmoe.data.problems import DataError
    from llava_cmoe.registry.manifest import RegistryError
    from llava_cmoe.training.processes import LaunchError

    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    except (RecipeError, DataError, RegistryError, BackboneError, LaunchError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _hush() -> None:
    """Silence three warnings that no user of this command can act on; to be called before these libraries load."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # no kernels for 4-bit models on a CPU, asked for or not
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT to transformers


def _is_news(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def show(console: Console, runs: Sequence[Results]) -> None:
    """Each run's matrix of its headline route and last row per protocol, then the metrics of all runs and routes."""
    from llava_cmoe.report.tables import matrix_table, metrics_table, protocols_table

    for results in runs:
        console.print(matrix_table(results))
        if compared := protocols_table(results):
            console.print(compared)
    console.print(metrics_table(runs))


def results_of(run: Path) -> Results:
    """A run's results, or an error that says how to get them."""
    from llava_cmoe.evaluation.log import read_results
    from llava_cmoe.registry.manifest import RegistryError

    path = run / "results.json"
    if not path.is_file():
        raise RegistryError(f"{path}: no such file; `llava-cmoe eval {run}` writes it")
    try:
        return read_results(path)
    except ValueError as error:
        raise RegistryError(str(error)) from error


def list_problems(console: Console, title: str, problems: Sequence[Problem]) -> None:
    """The first problems, one a line, and how many more there are."""
    if problems:
        console.print(f"[bold]{title}[/]", highlight=False)
    for problem in problems[:NUM_LISTED]:
        console.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > NUM_LISTED:
        console.print(f"  and {len(problems) - NUM_LISTED} more", highlight=False)
