"""The `llava-cmoe` command: parses what people type, calls the library, prints what comes back.

Each command imports the library when it runs: torch and transformers take seconds, and `--help` should not.
"""

from __future__ import annotations

import sys

import typer

from llava_cmoe.cli import data, learning, methods, results, runs, serving, sharing
from llava_cmoe.cli.signals import ending_in_one_line

app = typer.Typer(
    help="Teach a vision-language LLM one task after another without forgetting the earlier ones. Start with `demo`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(learning.app)
app.add_typer(methods.app)
app.add_typer(data.app, name="data")
app.add_typer(runs.app)
app.add_typer(serving.app)
app.add_typer(sharing.app)
app.add_typer(results.app)


def main(*command: str) -> None:
    """Entry point of `llava-cmoe`, and of the scripts in `train/` and `eval/`, which name their command."""
    try:
        with ending_in_one_line():  # also while the command line is read, before a command heeds signals itself
            app([*command, *sys.argv[1:]], prog_name="llava-cmoe")
    except typer.Exit as left:
        raise SystemExit(left.exit_code) from left
