"""The commands that work on what was measured, and load no model: scoring again, and putting results side by side.

As in `cli.py`, which shows them among its own, each command imports the library when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

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


@app.command()
@plainly()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs; each is tested against the first.", metavar="RUN...")
    ],
    published: Annotated[
        str | None, typer.Option(help="Published numbers to put beside, such as coin_llava_7b.", metavar="NAME")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for comparison.json, .md and .png.", metavar="DIR")] = None,
    root: Root = None,
) -> None:
    """Put runs side by side, with intervals, paired tests and a warning for whatever makes them incomparable.

    Tests draw questions anew, not training seeds: a sure difference between two runs may be one between two seeds.
    """
    from llava_cmoe.comparing import compare
    from llava_cmoe.report.comparison import comparison_markdown, comparison_tables
    from llava_cmoe.report.figures import draw_comparison

    console, found = Console(), compare(runs, published, root)
    for table in comparison_tables(found):
        console.print(table)
    if found.source:
        console.print(f"published: {found.source}", markup=False, highlight=False, soft_wrap=True)
    for warning in found.warnings:
        console.print(f"[bold yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.json").write_text(found.model_dump_json(indent=1) + "\n")
        (out / "comparison.md").write_text(comparison_markdown(found) + "\n")
        draw_comparison(found, out / "comparison.png")
        console.print(f"In {out}: comparison.json, comparison.md, comparison.png", highlight=False, soft_wrap=True)
