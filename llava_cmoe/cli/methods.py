"""The command that lists the methods."""

from __future__ import annotations

import typer

from llava_cmoe.cli.console import Console, say

app = typer.Typer()


@app.command()
def methods() -> None:
    """List every method: what it does, trains, stores and costs, and the engines that it runs under."""
    from llava_cmoe.methods.catalogue import catalogue

    console = Console()
    for card in catalogue():
        say(console, card.name, card.does, "bold")
        facts = {"trains": card.trained, "stores": card.stored, "answers with": card.answer}
        for label, words in {**facts, "runs under": ", ".join(("one process", *card.engines))}.items():
            say(console, f"  {label:12}", words, "dim")
    say(console, "Read", "r: rank, I and O: widths of a linear, D: of the hidden state, E: experts, T: tasks.", "bold")
    say(console, "More", "docs/methods.md", "bold")
