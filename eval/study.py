"""Commit what studies found, and put their tables into the README.

    python eval/study.py runs/studies/growth      # copies its study.json to eval/results/study_growth.json
    python eval/study.py --readme README.md       # the table of every committed study

A study's place in the README is between `<!-- study NAME: begin -->` and `<!-- study NAME: end -->`. What a study is,
and its table, is `report/studies.py`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_cmoe.report.studies import read_study, study_markdown, write_study_into


def main(
    studies: Annotated[list[Path] | None, typer.Argument(help="Folders of finished studies.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the committed documents.")] = Path("eval/results"),
    readme: Annotated[Path | None, typer.Option(help="README whose generated tables are replaced.")] = None,
) -> None:
    """Copy the documents of some studies, print the tables of all committed ones, and update the README if given."""
    try:
        for folder in studies or ():
            found = read_study(folder / "study.json")
            (results / f"study_{found.study['name']}.json").write_bytes((folder / "study.json").read_bytes())
        for path in sorted(results.glob("study_*.json")):
            summary = read_study(path)
            if readme is not None:
                write_study_into(readme, summary)
            typer.echo(f"{study_markdown(summary)}\n")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
