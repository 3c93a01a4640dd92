"""The commands that work on what was measured, and load no model: scoring again, and putting results side by side.

As in `cli.py`, which shows them among its own, each command imports the library when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from llava_cmoe.console import NUM_LISTED, plainly, show

app = typer.Typer()

Folder = Annotated[Path, typer.Argument(help="Folder with results.json and answers/, such as a run.", metavar="RUN")]
Root = Annotated[Path | None, typer.Option(help="Data root, where it moved since.", metavar="ROOT")]


@app.command()
@plainly()
def rescore(run: Folder, root: Root = None) -> None:
    """Score a run's stored answers again and write its results.json; no model is loaded.

    For answers or scoring rules that changed. Where nothing did, the file keeps its bytes.
    """
    from llava_cmoe.report.tables import number
    from llava_cmoe.rescoring import open_examined, rescore

    console = Console()
    results, changed = rescore(open_examined(run, root))
    show(console, [results])
    for one in changed[:NUM_LISTED]:
        line = f"{one.task} after {one.after} ({one.route}): was {number(one.before)}, now {number(one.now)}"
        console.print(line, highlight=False)
    console.print(f"In {run}: results.json; accuracies that changed: {len(changed)}", highlight=False, soft_wrap=True)
