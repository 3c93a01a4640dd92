"""The `llava-cmoe` command: parses what people type, calls the library, prints what comes back.

Each command imports the library when it runs: torch and transformers take seconds, and `--help` should not.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from llava_cmoe import cli_results
from llava_cmoe.console import list_problems, plainly, show, show_check, unknown_scorers
from llava_cmoe.settings import EvaluationSettings, load_recipe, parse_settings

app = typer.Typer(
    help="Teach a vision-language LLM one task after another without forgetting the earlier ones. Start with `demo`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make, or check, the folder of tasks that a run learns from.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(cli_results.app)

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run, such as runs/pocket_cmoe.", metavar="RUN")]


def main(*command: str) -> None:
    """Entry point of `llava-cmoe`, and of the scripts in `train/` and `eval/`, which name their command."""
    app([*command, *sys.argv[1:]], prog_name="llava-cmoe")


@app.command()
@plainly()
def demo(
    run: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("runs/demo"),
) -> None:
    """Watch eight small tasks being learned twice: once with forgetting, once without.

    Takes about ten minutes on 2 CPU cores. A demo that was stopped goes on where it was; a finished one is only shown.
    """
    from llava_cmoe.demo import DemoSize, run_demo
    from llava_cmoe.report.progress import ProgressLine

    size, console = DemoSize(), Console()
    about = (
        f"The demo learns from {size.train_rows} rows a task and asks {size.test_rows} questions: less than the runs "
        "in the README, so its numbers are lower."
    )
    if not (run / "results.json").exists():
        console.print(
            "Eight rendered tasks, one after another: first one LoRA adapter that every task trains (sequential_lora), "
            f"then LLaVA-CMoE (cmoe). {about}\nAbout ten minutes on 2 cores; stopped, the same command goes on.",
            highlight=False,
        )
    with ProgressLine(console) as line:
        both = run_demo(run, line, size)
    show(console, list(both.values()))
    console.print(
        f"Each row: after learning that task; each column: percent right on that task. {about}\n"
        f"In {run}: results.json, matrix.png. Delete the folder to run the demo again.",
        highlight=False,
    )


@data_app.command()
@plainly()
def make_pocket(
    root: Annotated[Path, typer.Argument(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes in every file.")] = 0,
    train_rows: Annotated[int, typer.Option(help="Training rows per task.", min=1)] = 2000,
    test_rows: Annotated[int, typer.Option(help="Evaluation rows per task, none of which is trained on.", min=1)] = 300,
) -> None:
    """Render the pocket sequence: eight small tasks in the folder layout, file format and answer formats of CoIN."""
    from llava_cmoe.data.pocket_root import make_pocket_root
    from llava_cmoe.report.progress import ProgressLine

    console = Console()
    with ProgressLine(console) as line:
        make_pocket_root(root, partial(line, "rendering"), seed=seed, train_rows=train_rows, test_rows=test_rows)
    console.print(f"{root}: 8 tasks, {train_rows} training and {test_rows} evaluation rows each", highlight=False)


@data_app.command()
@plainly()
def check(
    sequence: Annotated[
        str, typer.Argument(help="pocket, coin, or a YAML file that lists tasks.", metavar="SEQUENCE")
    ] = "pocket",
    root: Annotated[Path, typer.Option(help="Folder that holds the data.")] = Path("runs/data/pocket"),
    backbone: Annotated[
        str, typer.Option(help="Whose prompts the examples show: a model's folder or name.", metavar="MODEL")
    ] = "pocket",
    processes: Annotated[
        int | None, typer.Option(help="Processes that open pictures; one per core if absent.", min=1)
    ] = None,
) -> None:
    """Find everything that would stop training: every file is read, every picture is opened.

    Leaves with status 1 if anything is wrong. What stops nothing is told, too: row counts that are not the published
    ones, questions that are both learned and asked, and how one row of each task looks to the model.

    Samples that are too long are found by `train`, which knows the limit, before it begins.
    """
    from llava_cmoe.backbones.loading import load_processor
    from llava_cmoe.data.check import check_sequence
    from llava_cmoe.data.sequences import load_sequence
    from llava_cmoe.report.progress import ProgressLine

    console, tasks, processor = Console(), load_sequence(sequence), load_processor(backbone)
    scorers = unknown_scorers(tasks)
    with ProgressLine(console) as line:
        report = check_sequence(root, tasks, partial(line, "checking"), processes or os.cpu_count() or 1)
    report = replace(report, problems=(*scorers, *report.problems))
    show_check(console, report, processor)
    if not report.ok:
        raise typer.Exit(1)


@data_app.command()
@plainly()
def fetch(
    sequence: Annotated[str, typer.Argument(help="pocket, coin, or a YAML file that lists tasks.", metavar="SEQUENCE")],
    root: Annotated[Path, typer.Option(help="Folder for the data.")] = Path("runs/data"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be fetched.")] = False,
) -> None:
    """Say where the data of a sequence comes from, under which licence, and what must be done by hand; fetch the rest.

    What the Hugging Face Hub serves is downloaded into the folder; a download that was stopped goes on with the same
    command. Leaves with status 1 if a download fails.
    """
    from llava_cmoe.data.fetch import fetch_sources, render
    from llava_cmoe.data.sequences import load_sequence

    console, tasks = Console(), load_sequence(sequence)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    for told in render(tasks, root):
        say(told)
    failed = [] if dry_run else fetch_sources(tasks, root, say)
    list_problems(console, "could not be fetched", failed)
    if failed:
        raise typer.Exit(1)


@app.command()
@plainly()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe, such as train/recipes/pocket_cmoe.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's: seed=1 method.probe.alpha=0.5"),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(
            help="Run that learned the same experts: only locators are fitted, nothing is trained.", metavar="RUN"
        ),
    ] = None,
    anyway: Annotated[
        bool,
        typer.Option("--anyway", help="Go on with another recipe, data or number of processes than began the run."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be trained.")] = False,
) -> None:
    """Learn a sequence of tasks, evaluating after each one.

    A run that was stopped goes on with the same command. The pocket sequence is rendered first where it is missing.

    To try another locator on experts that are learned: --experts RUN method.locator.kind=gaussian run=OTHER

    On several processes: accelerate launch --config_file zero_configs/zero2.yaml train/continual.py RECIPE
    """
    from llava_cmoe.data.pocket_root import make_pocket_root
    from llava_cmoe.preview import preview, render
    from llava_cmoe.relocating import relocate
    from llava_cmoe.report.progress import ProgressLine
    from llava_cmoe.sequence import lacks_pocket, learn
    from llava_cmoe.training.processes import processes

    settings = load_recipe(recipe, overrides or ())
    launched = processes()
    console = Console(quiet=not launched.is_main_process)
    if dry_run:
        resolved = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
        console.print(resolved, markup=False, highlight=False, soft_wrap=True)
        console.print(render(preview(settings)))
        if not settings.data.root.exists():
            remedy = "it would be rendered first" if lacks_pocket(settings) else "training needs it"
            console.print(f"{settings.data.root} does not exist: {remedy}", highlight=False, soft_wrap=True)
        return
    with ProgressLine(console) as line:
        if launched.is_main_process and lacks_pocket(settings):
            console.print(f"{settings.data.root} is missing: rendering the pocket sequence there", soft_wrap=True)
            make_pocket_root(settings.data.root, partial(line, "rendering"))
        launched.wait_for_everyone()
        results = learn(settings, line, anyway) if experts is None else relocate(settings, experts, line)
    show(console, [results])
    console.print(f"In {settings.run}: results.json", highlight=False, soft_wrap=True)


@app.command()
@plainly()
def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe, such as train/recipes/pocket_cmoe.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's: method.experts.rank=32"),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="Sites that grow for each task after the first; as Eq. 2 makes likely if absent.", min=0),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sample; the recipe's training.max_length if absent.", min=1)
    ] = None,
    gpus: Annotated[
        list[int] | None, typer.Option(help="Number of GPUs; 8 if absent, may be given several times.", min=1)
    ] = None,
    mean: Annotated[
        float, typer.Option(help="Millions of trained parameters per task to find settings for; the paper's.", min=0)
    ] = 43.96,
    throughput: Annotated[
        float | None, typer.Option(help="Samples per second, all GPUs together: adds hours.", min=0.001)
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Training rows per task, for hours without the data at hand.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file for all numbers.", metavar="FILE")] = None,
) -> None:
    """Say what a recipe costs before anything is downloaded: parameters, memory, disk and hours.

    Needs the backbone's config.json alone; llava-hf/llava-1.5-7b-hf is known here, so no network is needed for it.
    """
    from llava_cmoe.budget.estimate import budget
    from llava_cmoe.budget.tables import render

    computed = budget(
        load_recipe(recipe, overrides or ()),
        wanted_mean=mean * 1e6,
        num_grown=layers,
        length=length,
        gpus=gpus or (8,),
        throughput=throughput,
        rows=rows,
    )
    Console().print(render(computed))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(computed.model_dump_json(indent=1) + "\n")


@app.command()
@plainly()
def convert(
    llm: Annotated[Path, typer.Option(help="LLaMA in transformers' format, such as vicuna-7b-v1.5.", metavar="DIR")],
    projector: Annotated[Path, typer.Option(help="mm_projector.bin of LLaVA's stage 1.", metavar="FILE")],
    vision: Annotated[Path, typer.Option(help="CLIP in transformers' format: ViT-L/14 at 336.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="Folder to write, for backbone.path.", metavar="DIR")],
) -> None:
    """Put an LLM, LLaVA's own projector file and a vision encoder together as one model of transformers.

    This is the base that CoIN starts from. Weights keep their bits. The projector's file is the only one that is not
    safetensors, and it is read as tensors alone: nothing in it is ever run.
    """
    from llava_cmoe.backbones.conversion import convert as put_together

    put_together(llm, projector, vision, out)
    Console().print(f"{out}: ready for backbone.path", highlight=False, soft_wrap=True)


@app.command()
@plainly()
def study(
    studies: Annotated[
        list[Path], typer.Argument(help="Study files, such as train/recipes/studies/rank.yaml.", metavar="STUDY...")
    ],
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time; one per GPU, else one per core, if absent.", min=1)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the studies and list their runs.")] = False,
) -> None:
    """Learn variants of a recipe from several seeds, several runs at a time, and put them into one table.

    A study that was stopped goes on with the same command; finished runs are only read. Leaves with status 1 if a run
    fails, after all the others.

    Writes study.json, table.md and last.png into runs/studies/NAME once all runs of that study are finished.
    """
    from llava_cmoe.report.progress import ProgressLine, StudyLine
    from llava_cmoe.studies.plan import plan_studies, render
    from llava_cmoe.studies.runner import render_missing, run_studies

    console, plans = Console(), plan_studies(studies, Path("runs/studies"))
    if dry_run:
        console.print(render(plans))
        return
    with ProgressLine(console) as line:
        render_missing(plans, partial(line, "rendering"))
    with StudyLine(console, sum(len(plan.runs) for plan in plans)) as bar:
        failed = run_studies(plans, jobs, bar)
    for plan in plans:
        if any(run in failed for run in plan.runs):
            console.print(f"{plan.folder}: no table, not all runs are finished", highlight=False, soft_wrap=True)
        else:
            table = (plan.folder / "table.md").read_text()
            console.print(table, markup=False, highlight=False, soft_wrap=True)
            console.print(f"In {plan.folder}: study.json, table.md, last.png", highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command("eval")
@plainly()
def evaluate(
    run: RunFolder,
    routes: Annotated[
        str | None,
        typer.Option(help="Ways to choose routers, measured beside the recipe's own: located,oracle,random"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions answered at once; the recipe's if absent.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Ask a stratified subset of N questions per task, into RUN/subsets/.", metavar="N"),
    ] = None,
    subset_seed: Annotated[int | None, typer.Option(help="Seed of the subset; the recipe's if absent.")] = None,
) -> None:
    """Measure what a run has learned so far, and write its results.json.

    What is answered already is not asked again, so this costs little after `train`.

    Routes: located, the run finds out which task a question belongs to; oracle, it is told; random, any learned task.
    """
    from llava_cmoe.registry.store import Registry
    from llava_cmoe.report.progress import ProgressLine
    from llava_cmoe.sequence import evaluate_run, subset_folder
    from llava_cmoe.training.processes import processes

    recipe = Registry(run).recipe()
    own = recipe.evaluation
    wanted = {"routes": [*dict.fromkeys((*own.routes, *(routes.split(",") if routes else ())))]}
    options = {"batch_size": batch_size, "limit": limit, "subset_seed": subset_seed}
    given = {key: value for key, value in options.items() if value is not None}
    evaluation = parse_settings(EvaluationSettings, own.model_dump() | wanted | given, source="llava-cmoe eval")
    console = Console(quiet=not processes().is_main_process)
    with ProgressLine(console) as line:
        asked = recipe.model_copy(update={"evaluation": evaluation})
        results = evaluate_run(asked, line)
    show(console, [results])
    console.print(f"In {subset_folder(asked)}: results.json", highlight=False, soft_wrap=True)


@app.command()
@plainly()
def probe(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to probe with: method.probe.alpha=0.5"),
    ] = None,
    after: Annotated[
        int | None, typer.Option(help="The model as it was after its first N tasks; as it is now if absent.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for all that is measured.", metavar="FILE")] = None,
) -> None:
    """Ask in which layers each task would grow, and change nothing: tasks that are learned should need few.

    Shows how much of a probe's use comes from the settings: compare method.probe.balance_weight=0, for example.
    """
    from llava_cmoe.calibration import probe_tasks, render
    from llava_cmoe.registry.store import Registry
    from llava_cmoe.report.progress import ProgressLine
    from llava_cmoe.settings import override
    from llava_cmoe.training.processes import processes

    recipe = override(Registry(run).recipe().model_dump(mode="json"), overrides or (), source=str(run))
    console = Console(quiet=not processes().is_main_process)
    with ProgressLine(console) as line:
        calibration = probe_tasks(recipe, after, line)
    console.print(render(calibration))
    if out is not None and processes().is_main_process:
        out.write_text(calibration.model_dump_json(indent=1) + "\n")


@app.command()
@plainly()
def merge(
    run: RunFolder,
    bound: Annotated[
        float, typer.Option(help="Most by which a task's loss may rise, in nats per answer token.", min=0)
    ] = 0.02,
    rows: Annotated[int, typer.Option(help="Rows per task, never learned, to measure that on, at most.", min=1)] = 200,
) -> None:
    """Leave out experts that are little used or like another one, as many as every task bears.

    What was learned stays as it is: the merge is an entry of its own in RUN/merges, and deleting it takes it back. It
    is checked on training rows that the run did not learn, so the run needs a data.train_rows below their number.
    """
    from llava_cmoe.merging import merge_run, render
    from llava_cmoe.registry.store import Registry
    from llava_cmoe.report.progress import ProgressLine

    console = Console()
    with ProgressLine(console) as line:
        record, folder = merge_run(Registry(run).recipe(), bound, rows, line)
    console.print(render(record))
    console.print(f"In {folder}: merge.json, answers/", highlight=False, soft_wrap=True)


@app.command()
@plainly()
def unseen(
    run: RunFolder,
    sequence: Annotated[
        str, typer.Option(help="Tasks that RUN never learned: a YAML file that lists them, or a name.")
    ] = "pocket_unseen",
    root: Annotated[Path, typer.Option(help="Folder with their Instructions_Original/ and cl_dataset/.")] = Path(
        "runs/data/pocket_unseen"
    ),
    out: Annotated[Path | None, typer.Option(help="JSON file for all that is measured.", metavar="FILE")] = None,
) -> None:
    """Ask a run what it never learned: does it leave these questions to the base model, and is nothing lost?

    The base model is the backbone without experts. Its score stands beside the run's on the same questions; how often
    the run wrongly leaves questions of its own tasks to the base model, below. Changes nothing in RUN.

    The task that ships asks for what the pocket backbone was pretrained on; it is rendered first where it is missing.
    """
    from llava_cmoe.data.pocket import UNSEEN
    from llava_cmoe.data.pocket_root import make_pocket_root
    from llava_cmoe.data.sequences import load_sequence
    from llava_cmoe.registry.store import Registry
    from llava_cmoe.report.progress import ProgressLine
    from llava_cmoe.unseen import check_unseen, measure_unseen, render

    recipe, tasks = Registry(run).recipe(), load_sequence(sequence)
    check_unseen(recipe, tasks)
    console = Console()
    with ProgressLine(console) as line:
        if tasks.name == "pocket_unseen" and not root.exists():
            # The one training row is never learned: readers of a data root want a file of them.
            make_pocket_root(root, partial(line, "rendering"), train_rows=1, tasks=[UNSEEN.name])
        results = measure_unseen(recipe, tasks, root, line)
    console.print(render(results))
    if out is not None:
        out.write_text(results.model_dump_json(indent=1) + "\n")


@app.command()
@plainly()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs to put side by side.", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="Folder for the figures; the first RUN if absent.")] = None,
) -> None:
    """Show accuracy matrices and metrics of finished runs, and draw them.

    Writes matrix.png (accuracy), and for methods that have it confusion.png (locator) and growth.png (experts added).
    """
    from llava_cmoe.report.figures import draw_confusion, draw_growth, draw_matrices
    from llava_cmoe.rescoring import results_of

    found = [results_of(run) for run in runs]
    folder, console = out or runs[0], Console()
    show(console, found)
    draw_matrices(found, folder / "matrix.png")
    written = ["matrix.png"]
    for results in found:
        name = f"_{results.run}" if len(found) > 1 else ""
        if results.locator is not None:
            draw_confusion(results, folder / f"confusion{name}.png")
            written.append(f"confusion{name}.png")
        if any(results.growth.values()):
            draw_growth(results, folder / f"growth{name}.png")
            written.append(f"growth{name}.png")
    console.print(f"In {folder}: {', '.join(written)}", highlight=False, soft_wrap=True)


@app.command()
@plainly()
def chat(
    run: RunFolder,
    image: Annotated[
        Path | None, typer.Option(help="Picture to talk about; none for questions of text alone.", metavar="FILE")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="One question; without it, questions are read until `exit`.")
    ] = None,
    after: Annotated[
        int | None, typer.Option(help="The model as it was after its first N stages; as it is now if absent.", min=0)
    ] = None,
    merge: Annotated[int | None, typer.Option(help="With the experts that merge N of the run leaves.", min=1)] = None,
) -> None:
    r"""Ask a run about a picture, or none; it says which task it took the question for, and answers.

    Questions are best asked as the tasks ask them, with the instruction on a line of its own (write \n before it).
    """
    from llava_cmoe.chat.session import open_session
    from llava_cmoe.chat.terminal import answer, converse

    console, session = Console(), open_session(run, after, merge)
    if prompt is None:
        converse(console, session, image)
    else:
        answer(console, session, image, prompt)


if __name__ == "__main__":
    main()
