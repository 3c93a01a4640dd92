"""The commands that make, check or fetch the folder of tasks that a run learns from."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from llava_cmoe.cli.console import Console, list_problems, show_check, unknown_scorers, user_errors
from llava_cmoe.cli.numbers import whole
from llava_cmoe.settings.values import MOST_PROCESSES

MOST_ROWS = 1_000_000
"""Of a rendered task: some hundred GB."""

app = typer.Typer(help="Make, or check, the folder of tasks that a run learns from.", no_args_is_help=True)


@app.command()
@user_errors()
def make_pocket(
    root: Annotated[Path, typer.Argument(help="Folder to make.")],
    seed: Annotated[int, whole("--seed", "The same seed gives the same bytes in every file.", least=0)] = 0,
    train_rows: Annotated[int, whole("--train-rows", "Training rows per task.", least=1, most=MOST_ROWS)] = 2000,
    test_rows: Annotated[
        int, whole("--test-rows", "Evaluation rows per task, none of which is trained on.", least=1, most=MOST_ROWS)
    ] = 300,
) -> None:
    """Render the pocket sequence: eight small tasks in the folder layout, file format and answer formats of CoIN."""
    from llava_cmoe.cli.progress import ProgressLine
    from llava_cmoe.pocket.root import make_pocket_root

    console = Console()
    with ProgressLine(console) as line:
        make_pocket_root(root, partial(line, "rendering"), seed=seed, train_rows=train_rows, test_rows=test_rows)
    console.print(f"{root}: 8 tasks, {train_rows} training and {test_rows} evaluation rows each", highlight=False)


@app.command()
@user_errors()
def check(
    sequence: Annotated[
        str, typer.Argument(help="pocket, coin, or a YAML file that lists tasks.", metavar="SEQUENCE")
    ] = "pocket",
    root: Annotated[Path, typer.Option(help="Folder that holds the data.")] = Path("runs/data/pocket"),
    backbone: Annotated[
        str, typer.Option(help="Whose prompts the examples show: a model's folder or name.", metavar="MODEL")
    ] = "pocket",
    processes: Annotated[
        int | None,
        whole("--processes", "Processes that open pictures; one per core if absent.", least=1, most=MOST_PROCESSES),
    ] = None,
    max_pixels: Annotated[
        int | None,
        whole("--max-pixels", "The recipe's data.max_pixels: larger pictures are shrunk, not refused.", least=1),
    ] = None,
    max_length: Annotated[
        int | None,
        whole("--max-length", "The recipe's training.max_length: longer samples are refused.", least=1),
    ] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="For evaluation.split validation: training rows are asked, too.")
    ] = False,
) -> None:
    """Find everything that would stop training: every file is read, every picture is opened.

    Leaves with status 1 if anything is wrong. What stops nothing is told, too: row counts that are not the published
    ones, questions that are both learned and asked, and how one row of each task looks to the model.

    What only a recipe knows is found by `train` before it begins, or here where it is told: --max-length, --validation.
    """
    from llava_cmoe.backbones.loading import load_processor
    from llava_cmoe.cli.progress import ProgressLine
    from llava_cmoe.data.check import check_sequence
    from llava_cmoe.data.sequences import load_sequence

    console, tasks, processor = Console(), load_sequence(sequence), load_processor(backbone)
    scorers = unknown_scorers(tasks)
    with ProgressLine(console) as line:
        report = check_sequence(
            root,
            tasks,
            partial(line, "checking"),
            processes=processes or os.cpu_count() or 1,
            max_pixels=max_pixels,
            processor=processor,
            max_length=max_length,
            validation=validation,
        )
    report = replace(report, problems=(*scorers, *report.problems))
    show_check(console, report, processor)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@user_errors()
def fetch(
    sequence: Annotated[str, typer.Argument(help="pocket, coin, or a YAML file that lists tasks.", metavar="SEQUENCE")],
    root: Annotated[Path, typer.Option(help="Folder for the data.")] = Path("runs/data"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be fetched.")] = False,
) -> None:
    """Say where the data of a sequence comes from, under which licence, and what must be done by hand; fetch the rest.

    What the Hugging Face Hub serves is downloaded into the folder; a download that was stopped goes on with the same
    command. Leaves with status 1 if a download fails.
    """
    from llava_cmoe.data.fetch import fetch_sources, render
    from llava_cmoe.data.sequences import load_sequence

    console, tasks = Console(), load_sequence(sequence)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    for told in render(tasks, root):
        say(told)
    failed = [] if dry_run else fetch_sources(tasks, root, say)
    list_problems(console, "could not be fetched", failed)
    if failed:
        raise typer.Exit(1)
