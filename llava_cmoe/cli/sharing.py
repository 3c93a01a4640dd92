"""The commands that give a run to others, or take one from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava_cmoe.cli.console import Console, user_errors
from llava_cmoe.cli.numbers import whole
from llava_cmoe.cli.runs import RunFolder

app = typer.Typer()


@app.command()
@user_errors()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="Folder to make.", metavar="DIR")],
    task: Annotated[
        str | None, typer.Option(help="Learned task whose experts leave; may be absent where all answer alike.")
    ] = None,
    form: Annotated[Literal["peft"], typer.Option("--as", help="Format of the adapter.")] = "peft",
    merged: Annotated[
        bool, typer.Option("--merged", help="A whole checkpoint, the adapter in its weights, instead of an adapter.")
    ] = False,
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="Where tokens choose experts: the closest adapter, measured on the data."),
    ] = False,
    rows: Annotated[int, whole("--rows", "Rows to fit it on, and questions to compare it on, at most.", least=1)] = 200,
) -> None:
    """Write what a run answers a task with as a folder that stock PEFT or transformers loads.

    Exact where the task alone decides which experts answer (one expert a site, or fixed weights). Where tokens choose,
    nothing is written but with --approximate, which says how many answers and next tokens stay the run's.

    Example: llava-cmoe export runs/pocket_lora_per_task --task VizWiz --as peft --to runs/vizwiz_adapter
    """
    del form  # there is one
    from llava_cmoe.cli.progress import ProgressLine
    from llava_cmoe.export.adapter_card import exactness
    from llava_cmoe.export.exporting import export as write

    console = Console()
    with ProgressLine(console) as line:
        written = write(run, to, task, merged=merged, approximate=approximate, rows=rows, progress=line)
    console.print(exactness(written.agreement), highlight=False, soft_wrap=True)
    console.print(f"In {to}: {', '.join(written.files)}", highlight=False, soft_wrap=True)


RepoId = Annotated[str, typer.Argument(help="Repository of the hub: USER/NAME.", metavar="REPO_ID")]


@app.command()
@user_errors()
def push(
    run: RunFolder,
    repo_id: RepoId,
    public: Annotated[
        bool, typer.Option("--public", help="Everybody can see a repository that is made; else only its owner.")
    ] = False,
) -> None:
    """Put a run on the hub, with a card that shows its accuracies: tensors, records, results and answers.

    Everything is verified first. Logs, checkpoints and reports stay here. Log in by HF_TOKEN or the hub's command.

    Example: llava-cmoe push runs/pocket_cmoe USER/pocket_cmoe
    """
    from llava_cmoe.export.hub import push as upload

    Console().print(f"At {upload(run, repo_id, public=public)}", highlight=False, soft_wrap=True)


@app.command()
@user_errors()
def pull(
    repo_id: RepoId,
    to: Annotated[Path, typer.Option(help="Folder to make.", metavar="DIR")],
    backbone: Annotated[
        str | None,
        typer.Option(help="Model folder or name that the run is opened on; needed unless its backbone is pocket."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the newest if absent.")] = None,
) -> None:
    """Fetch a run from the hub into a folder, whole or not at all: only parts of a run, every hash verified.

    Example: llava-cmoe pull USER/pocket_cmoe --to runs/theirs
    """
    from llava_cmoe.export.hub import pull as fetch

    parts = fetch(repo_id, to, backbone=backbone, revision=revision)
    console = Console()
    console.print(f"In {to}: {len(parts)} files, verified", highlight=False, soft_wrap=True)
    console.print(f"llava-cmoe chat {to} talks to it", highlight=False, soft_wrap=True)
