"""Summarise runs over seeds and put their table into the README.

    python eval/headline.py runs/headline/* --out eval/results/pocket.json --readme README.md

What is summarised, and what runs must have in common, is `report/headline.py`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_cmoe.evaluation.log import read_results
from llava_cmoe.report.headline import Headline, headline_markdown, summarise, write_into


def main(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of finished runs, several seeds of each method.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Summary to write; without runs, the one to read.")] = Path(
        "eval/results/pocket.json"
    ),
    readme: Annotated[Path | None, typer.Option(help="README whose generated table is replaced.")] = None,
) -> None:
    """Write the summary of some runs, print its table, and update the README if one is given."""
    try:
        if runs:
            headline = summarise([read_results(run / "results.json") for run in runs])
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(headline.model_dump_json(indent=1) + "\n")
        else:
            headline = Headline.model_validate_json(out.read_bytes())
        if readme is not None:
            write_into(readme, headline)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(headline_markdown(headline))


if __name__ == "__main__":
    typer.run(main)
