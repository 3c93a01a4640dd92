"""The commands that learn, make what is learned on, or compute what learning would cost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
import yaml

from llava_cmoe.cli.console import Console, show, user_errors
from llava_cmoe.cli.numbers import decimal, whole
from llava_cmoe.settings.recipes import load_recipe
from llava_cmoe.settings.run import Recipe
from llava_cmoe.settings.values import MOST_PROCESSES, SIZES

app = typer.Typer()


@app.command()
@user_errors()
def demo(
    run: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("runs/demo"),
) -> None:
    """Watch eight small tasks being learned three times: once with forgetting, twice without.

    A demo that was stopped goes on where it was; a finished one is only shown.
    """
    from llava_cmoe.cli.pocket_demo import DemoSize, run_demo
    from llava_cmoe.cli.progress import ProgressLine

    size, console = DemoSize(), Console()
    about = (
        f"The demo trains on {size.train_rows} rows a task and evaluates on {size.test_rows}: fewer than the runs in "
        "the README, so its numbers are lower."
    )
    if not (run / "results.json").exists():
        console.print(
            "Eight rendered tasks, one after another: by one LoRA adapter that every task trains (sequential_lora), by "
            "a frozen one for each task behind a locator (lora_per_task), and by LLaVA-CMoE (cmoe). "
            f"{about}\nStopped, the same command goes on.",
            highlight=False,
        )
    with ProgressLine(console) as line:
        learned = run_demo(run, line, size)
    show(console, list(learned.values()))
    console.print(
        f"Each row: after learning that task; each column: percent right on that task. {about}\n"
        f"In {run}: results.json, matrix.png. Delete the folder to run the demo again.",
        highlight=False,
    )


@app.command()
@user_errors()
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
    force: Annotated[
        bool,
        typer.Option("--anyway", help="Go on with another recipe, data, backbone or process count than began the run."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be trained.")] = False,
) -> None:
    """Learn a sequence of tasks, evaluating after each one.

    A run that was stopped goes on with the same command. The pocket sequence is rendered first where it is missing.

    In a terminal, one line shows stage, phase, loss and what is left; progress.html in the run folder shows a browser.

    To try another locator on experts that are learned: --experts RUN method.locator.kind=gaussian run=OTHER

    On several processes: accelerate launch --config_file zero_configs/zero2.yaml train/continual.py RECIPE

    Example: llava-cmoe train train/recipes/pocket_cmoe.yaml
    """
    from llava_cmoe import api
    from llava_cmoe.cli.progress import RunLine
    from llava_cmoe.data.task_data import lacks_pocket, sequence_of
    from llava_cmoe.methods import method_of
    from llava_cmoe.runs.progress import RunProgress
    from llava_cmoe.runs.progress_page import ProgressPage
    from llava_cmoe.training.processes import processes

    settings = load_recipe(recipe, overrides or ())
    launched = processes()
    console = Console(quiet=not launched.is_main_process)
    if dry_run:
        _show_dry_run(console, settings)
        return
    stages = method_of(settings.method).stages(sequence_of(settings.data).names)
    progress = RunProgress(settings.run, [stage.name for stage in stages])
    with RunLine(console, progress, ProgressPage(progress) if launched.is_main_process else None) as line:
        if launched.is_main_process and lacks_pocket(settings.data):
            console.print(f"{settings.data.root} is missing: rendering the pocket sequence there", soft_wrap=True)
        results = api.learn(settings, experts=experts, force=force, progress=line)
    show(console, [results])
    console.print(f"In {settings.run}: results.json", highlight=False, soft_wrap=True)


def _show_dry_run(console: Console, settings: Recipe) -> None:
    """The resolved recipe, what would be trained, and what is missing."""
    from llava_cmoe.data.task_data import lacks_pocket
    from llava_cmoe.planning.dry_run import preview, render

    resolved = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    console.print(resolved, markup=False, highlight=False, soft_wrap=True)
    console.print(render(preview(settings)))
    if not settings.data.root.exists():
        remedy = "it would be rendered first" if lacks_pocket(settings.data) else "training needs it"
        console.print(f"{settings.data.root} does not exist: {remedy}", highlight=False, soft_wrap=True)


@app.command()
@user_errors()
def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe, such as train/recipes/pocket_cmoe.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's: method.experts.rank=32"),
    ] = None,
    layers: Annotated[
        int | None,
        whole("--layers", "Sites that grow for each task after the first; as Eq. 2 makes likely if absent.", least=0),
    ] = None,
    length: Annotated[
        int | None,
        whole(
            "--length",
            "Tokens of a sample; the recipe's training.max_length if absent.",
            least=1,
            most=SIZES["max_length"],
        ),
    ] = None,
    gpus: Annotated[
        list[int] | None,
        whole("--gpus", "Number of GPUs; 8 if absent, may be given several times.", least=1, most=100_000),
    ] = None,
    throughput: Annotated[
        float | None,
        decimal("--throughput", "Samples per second, all GPUs together: adds hours.", least=0.001, most=1e9),
    ] = None,
    rows: Annotated[
        int | None, whole("--rows", "Training rows per task, for hours without the data at hand.", least=1)
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file for all numbers.", metavar="FILE")] = None,
) -> None:
    """Compute what a recipe would cost before anything is downloaded: parameters, memory, disk and hours.

    Needs the backbone's config.json alone; llava-hf/llava-1.5-7b-hf is known here, so no network is needed for it.
    """
    from llava_cmoe.planning.estimate import budget
    from llava_cmoe.planning.tables import render
    from llava_cmoe.provenance.files import write_atomically

    computed = budget(
        load_recipe(recipe, overrides or ()),
        num_grown=layers,
        length=length,
        gpus=gpus or (8,),
        throughput=throughput,
        rows=rows,
    )
    Console().print(render(computed))
    if out is not None:
        write_atomically(out, f"{computed.model_dump_json(indent=1)}\n".encode())


@app.command()
@user_errors()
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
@user_errors()
def study(
    studies: Annotated[
        list[Path], typer.Argument(help="Study files, such as train/recipes/studies/growth.yaml.", metavar="STUDY...")
    ],
    jobs: Annotated[
        int | None,
        whole("--jobs", "Runs at a time; one per GPU, else one per core, if absent.", least=1, most=MOST_PROCESSES),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the studies and list their runs.")] = False,
) -> None:
    """Learn variants of a recipe from several seeds, several runs at a time, and put them into one table.

    A study that was stopped goes on with the same command; finished runs are only read. Leaves with status 1 if a run
    fails, after all the others.

    Writes study.json, table.md and last.png into runs/studies/NAME once all runs of that study are finished.
    """
    from llava_cmoe.cli.progress import ProgressLine, StudyLine
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
