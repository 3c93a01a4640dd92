"""Commit what merges of finished runs save and cost, and put their table into the README.

    python eval/merges.py runs/spare --out eval/results/merges.json     # each run's last merge
    python eval/merges.py --readme README.md                            # the table, from the committed JSON

What a merge is, and how one is found, is `llava-cmoe merge`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_cmoe.evaluation.log import read_results
from llava_cmoe.merging.store import Merges
from llava_cmoe.merging.summary import MergeSummary, merges_markdown, summarise_merges, write_merges_into
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of finished and merged runs.")] = None,
    out: Annotated[Path, typer.Option(help="Summary to write; without runs, the one to read.")] = Path(
        "eval/results/merges.json"
    ),
    readme: Annotated[Path | None, typer.Option(help="README whose generated table is replaced.")] = None,
) -> None:
    """Write the summary of some runs' last merges, print its table, and update the README if one is given."""
    try:
        if runs:
            merged = [(read_results(run / "results.json"), Merges(Registry(run)).last()) for run in runs]
            out.write_text(summarise_merges(merged).model_dump_json(indent=1) + "\n")
        summary = MergeSummary.model_validate_json(out.read_bytes())
        if readme is not None:
            write_merges_into(readme, summary)
    except (OSError, ValueError, RegistryError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(merges_markdown(summary))


if __name__ == "__main__":
    typer.run(main)
