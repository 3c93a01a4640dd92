"""Write docs/results.md and the README's table from the committed JSON, and the list of methods from the code.

    python eval/results_page.py

What stands on the page is `llava_cmoe/report/results_page.py`'s; `eval/collect.py` makes the JSON from finished runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_cmoe.methods.catalogue import catalogue, markdown
from llava_cmoe.report.headline import Headline, readme_markdown
from llava_cmoe.report.readme import write_between
from llava_cmoe.report.results_page import HEADLINE, results_page


def main(
    results: Annotated[Path, typer.Option(help="Folder of the committed JSON.")] = Path("eval/results"),
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/results.md"),
    readme: Annotated[Path, typer.Option(help="README whose table is replaced.")] = Path("README.md"),
    methods: Annotated[Path, typer.Option(help="Page whose list of methods is replaced.")] = Path("docs/methods.md"),
) -> None:
    """Write the page, the table in the README, and the list of methods."""
    try:
        headline = Headline.model_validate_json((results / HEADLINE).read_bytes())
        text = results_page(results)
        write_between(readme, "headline", readme_markdown(headline))
        write_between(methods, "catalogue", markdown(catalogue()))
        page.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{page}, {readme}, {methods}: written from {results}")


if __name__ == "__main__":
    typer.run(main)
