"""Turn finished runs into the JSON that is committed in eval/results.

    python eval/collect.py headline runs/studies/headline/*/   # several seeds of each method
    python eval/collect.py study runs/studies/growth            # a study's study.json
    python eval/collect.py merges runs/spare                    # the last merge of each run
    python eval/collect.py similarity runs/studies/headline/cmoe_3      # how alike the experts of a run compute

`llava-cmoe probe`, `llava-cmoe unseen` and `eval/speed.py` write theirs by `--out`; `eval/results_page.py` shows all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from llava_cmoe.analyses.expert_similarity import measure_similarity
from llava_cmoe.evaluation.log import read_results
from llava_cmoe.merging.store import Merges
from llava_cmoe.merging.summary import summarise_merges
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.report.headline import Headline, joined, summarise
from llava_cmoe.report.studies import read_study

RESULTS = Path("eval/results")

app = typer.Typer(help="Turn finished runs into the JSON that is committed in eval/results.", no_args_is_help=True)


@app.command()
def headline(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, several seeds of each method.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = RESULTS / "pocket.json",
) -> None:
    """Mean and spread of every number, row by row; rows that the file has and these runs are not of stay."""
    with _user_errors():
        measured = summarise([read_results(run / "results.json") for run in runs])
        _write(out, joined(Headline.model_validate_json(out.read_bytes()), measured) if out.exists() else measured)


@app.command()
def study(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished studies.")],
    out: Annotated[Path, typer.Option(help="Folder for study_NAME.json.")] = RESULTS,
) -> None:
    """The study.json of each study, byte for byte."""
    with _user_errors():
        for folder in folders:
            path = folder / "study.json"
            target = out / f"study_{read_study(path).study['name']}.json"
            target.write_bytes(path.read_bytes())
            typer.echo(f"{target}: written")


@app.command()
def merges(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished and merged runs.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = RESULTS / "merges.json",
) -> None:
    """What the last merge of each run saves and costs."""
    with _user_errors():
        merged = [(read_results(run / "results.json"), Merges(Registry(run)).last()) for run in runs]
        _write(out, summarise_merges(merged))


@app.command()
def similarity(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of a method with a pool of experts.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = RESULTS / "diversity.json",
) -> None:
    """Cosines between what experts add, task by task."""
    with _user_errors():
        _write(out, measure_similarity(run))


def _write(out: Path, document: BaseModel) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document.model_dump_json(indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{out}: written")


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RegistryError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
