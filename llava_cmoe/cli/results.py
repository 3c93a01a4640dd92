"""The commands on what was measured: scored again, compared, drawn, reproduced, exchanged with other toolkits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from llava_cmoe.cli.console import NUM_LISTED, Console, say, show, user_errors
from llava_cmoe.settings.recipes import load_recipe

app = typer.Typer()
answers_app = typer.Typer(help="Give answers to other toolkits, or score theirs.", no_args_is_help=True)
app.add_typer(answers_app, name="answers")

Folder = Annotated[Path, typer.Argument(help="Folder with results.json and answers/, such as a run.", metavar="RUN")]
Root = Annotated[Path | None, typer.Option(help="Data root, where it moved since.", metavar="ROOT")]


@app.command()
@user_errors()
def rescore(run: Folder, root: Root = None) -> None:
    """Score a run's stored answers again and write its results.json; no model is loaded.

    For answers or scoring rules that changed. Where nothing did, the file keeps its bytes.
    """
    from llava_cmoe.cli.progress import ProgressLine
    from llava_cmoe.evaluation.rescoring import open_examined, rescore
    from llava_cmoe.registry.run_lock import writing
    from llava_cmoe.report.tables import number

    console = Console()
    with writing(run), ProgressLine(console) as bar:
        results, changed = rescore(open_examined(run, root, bound=False), partial(bar, run.name))
    show(console, [results])
    for one in changed[:NUM_LISTED]:
        line = f"{one.task} after {one.after} ({one.route}): was {number(one.before)}, now {number(one.now)}"
        console.print(line, highlight=False)
    console.print(f"In {run}: results.json; accuracies that changed: {len(changed)}", highlight=False, soft_wrap=True)


@app.command()
@user_errors()
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
    from llava_cmoe.provenance.files import write_atomically
    from llava_cmoe.report.comparison import comparison_markdown, comparison_tables
    from llava_cmoe.report.figures import draw_comparison
    from llava_cmoe.report.paired_tests import compare

    console, found = Console(), compare(runs, published, root)
    for table in comparison_tables(found):
        console.print(table)
    if found.source:
        console.print(f"published: {found.source}", markup=False, highlight=False, soft_wrap=True)
    for warning in found.warnings:
        say(console, "warning:", warning, "bold yellow")
    if out is not None:
        write_atomically(out / "comparison.json", f"{found.model_dump_json(indent=1)}\n".encode())
        write_atomically(out / "comparison.md", f"{comparison_markdown(found)}\n".encode())
        draw_comparison(found, out / "comparison.png")
        console.print(f"In {out}: comparison.json, comparison.md, comparison.png", highlight=False, soft_wrap=True)


@app.command()
@user_errors()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs to put side by side.", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="Folder for what is written; the first RUN if absent.")] = None,
    root: Root = None,
) -> None:
    """Show accuracy matrices and metrics of finished runs, and write all that is known of them into report.html.

    Beside it, every figure as PNG and SVG (matrix, forgetting, and for methods that have it confusion and growth), and
    the tables as Markdown and LaTeX. No model is loaded. Without the data, pictures and verdicts are left out.
    """
    from llava_cmoe.report.report_files import write_report
    from llava_cmoe.report.reported import open_reported

    found, folder, console = open_reported(runs, root), out or runs[0], Console()
    show(console, [run.results for run in found])
    written = write_report(found, folder, root)
    for note in (note for run in found for note in run.notes):
        say(console, "note:", note, "yellow")
    console.print(f"In {folder}: {', '.join(written)}", highlight=False, soft_wrap=True)


@app.command()
@user_errors()
def reproduce(
    run: Folder,
    to: Annotated[
        Path | None, typer.Option(help="Folder of the repetition; RUN_again if absent.", metavar="DIR")
    ] = None,
) -> None:
    """Learn a run again from its own recipe, and list what differs in the end: results, answers, tensors.

    Leaves with status 1 if anything does. A repetition that was stopped goes on with the same command.
    """
    from llava_cmoe.analyses.reproduction import reproduce
    from llava_cmoe.cli.progress import ProgressLine

    console, again = Console(), to or run.with_name(f"{run.name}_again")
    with ProgressLine(console) as bar:
        found = reproduce(run, again, bar)
    for key in found.results[:NUM_LISTED]:
        console.print(f"results.json: {key}", markup=False, highlight=False, soft_wrap=True)
    for name, differing in list(found.answers.items())[:NUM_LISTED]:
        console.print(f"{name}: {differing} answers differ", markup=False, highlight=False, soft_wrap=True)
    for stage in found.stages:
        console.print(f"{stage}: other tensors or facts were learned", markup=False, highlight=False)
    verdict = "nothing differs" if found.same else "not the same"
    console.print(f"{run} and {again}: {verdict}", style="green" if found.same else "bold red", highlight=False)
    if not found.same:
        raise typer.Exit(1)


@answers_app.command("export")
@user_errors()
def export_command(
    run: Folder,
    to: Annotated[Path, typer.Option(help="Folder to make.", metavar="DIR")],
    route: Annotated[str | None, typer.Option(help="located, oracle or random; the headline if absent.")] = None,
    root: Root = None,
) -> None:
    """Write a run's answers as CoIN's files: DIR/TASK/STAGE/merge.jsonl and Result.text.

    STAGE is the task learned last.
    """
    from llava_cmoe.evaluation.official.coin_format import export_answers
    from llava_cmoe.evaluation.rescoring import open_examined

    examined, console = open_examined(run, root), Console()
    written = export_answers(examined, to, route)
    console.print(f"In {to}: answers of {len(written)} cells", highlight=False, soft_wrap=True)
    if examined.results.subset or examined.results.recipe["data"].get("eval_rows"):
        note = "only a part of the questions was evaluated; the released scripts of ImageNet and ScienceQA expect all"
        say(console, "warning:", note, "bold yellow")


@answers_app.command("import")
@user_errors()
def import_command(
    source: Annotated[Path, typer.Argument(help="Folder with TASK/STAGE/merge.jsonl.", metavar="DIR")],
    recipe: Annotated[Path, typer.Option(help="Recipe with the data that the answers are to.")],
    run: Annotated[Path, typer.Option(help="Folder to make, with answers/ and results.json.", metavar="RUN")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's: data.root=ROOT")
    ] = None,
    method: Annotated[str, typer.Option(help="What to call the method in tables.")] = "imported",
    base: Annotated[str, typer.Option(help="Name of the frozen model.")] = "unknown",
) -> None:
    """Score another toolkit's answers and put them into a matrix; every id is checked.

    RUN can then be reported, compared and scored again like a run of one's own.
    """
    from llava_cmoe.cli.progress import ProgressLine
    from llava_cmoe.evaluation.official.coin_format import import_answers

    imported, console = load_recipe(recipe, [*(overrides or ()), f"run={run}"]), Console()
    with ProgressLine(console) as bar:
        results, stated = import_answers(source, imported, method, base, partial(bar, run.name))
    show(console, [results])
    for one in stated:
        if abs(one.stated - one.scored) > 0.01:
            both = f"Result.text says {one.stated:.2f}, scored here by {one.protocol}: {one.scored:.2f}"
            console.print(f"{one.task} after {one.after}: {both}", highlight=False)
    console.print(f"In {run}: answers/, results.json", highlight=False, soft_wrap=True)
