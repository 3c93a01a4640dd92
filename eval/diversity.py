"""How alike the experts of a finished run compute, by the cosine of what they add.

    python eval/diversity.py runs/headline/cmoe_0 --out eval/results/diversity.json

What is compared is `llava_cmoe/analyses/expert_similarity.py`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_cmoe.analyses.expert_similarity import measure_diversity, render
from llava_cmoe.registry.schema import RegistryError


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of CMoE.")],
    out: Annotated[Path | None, typer.Option(help="Also write what is shown to this JSON file.")] = None,
) -> None:
    """Show, task by task, how alike the experts are that were added."""
    try:
        diversity = measure_diversity(run)
    except RegistryError as error:
        raise typer.BadParameter(str(error)) from error
    if out is not None:
        out.write_text(diversity.model_dump_json(indent=1) + "\n")
    typer.echo(render(diversity))


if __name__ == "__main__":
    typer.run(main)
