"""The commands that load what a run has learned: measure it, probe it, merge it, talk to it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from llava_cmoe.cli.console import Console, show, user_errors
from llava_cmoe.cli.numbers import decimal, whole

app = typer.Typer()

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run, such as runs/pocket_cmoe.", metavar="RUN")]


@app.command("eval")
@user_errors()
def evaluate(
    run: RunFolder,
    routes: Annotated[
        str | None,
        typer.Option(help="Ways to choose routers, measured beside the recipe's own: located,oracle,random"),
    ] = None,
    batch_size: Annotated[
        int | None, whole("--batch-size", "Questions answered at once; the recipe's if absent.", least=1)
    ] = None,
    limit: Annotated[
        int | None,
        whole("--limit", "Ask a stratified subset of N questions per task, into RUN/subsets/.", least=1),
    ] = None,
    subset_seed: Annotated[
        int | None, whole("--subset-seed", "Seed of the subset; the recipe's if absent.", least=0)
    ] = None,
) -> None:
    """Measure what a run has learned so far, and write its results.json.

    What is answered already is not asked again, so this costs little after `train`.

    Routes: located, the run finds out which task a question belongs to; oracle, it is told; random, any learned task.
    """
    from llava_cmoe import api
    from llava_cmoe.cli.progress import ProgressLine
    from llava_cmoe.runs.run import subset_folder
    from llava_cmoe.training.processes import processes

    console, named = Console(quiet=not processes().is_main_process), routes.split(",") if routes else ()
    with ProgressLine(console) as line:
        results = api.evaluate(
            run, routes=named, batch_size=batch_size, limit=limit, subset_seed=subset_seed, progress=line
        )
    show(console, [results])
    folder = subset_folder(api.evaluation_of(run, limit=limit, subset_seed=subset_seed))
    console.print(f"In {folder}: results.json", highlight=False, soft_wrap=True)


@app.command()
@user_errors()
def probe(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to probe with: method.probe.alpha=0.5"),
    ] = None,
    after: Annotated[
        int | None, whole("--after", "The model as it was after its first N tasks; as it is now if absent.", least=1)
    ] = None,
    seeds: Annotated[
        int,
        whole("--seeds", "Probe each task from N seeds, and report how far the decisions agree.", least=1, most=1_000),
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file for all that is measured.", metavar="FILE")] = None,
) -> None:
    """Ask in which layers each task would grow, and change nothing: tasks that are learned should need few.

    Shows how much of a probe's use comes from the settings: compare method.probe.balance_weight=0, for example.
    """
    from llava_cmoe.analyses.probe_report import probe_tasks, render
    from llava_cmoe.cli.progress import ProgressLine
    from llava_cmoe.provenance.files import write_atomically
    from llava_cmoe.registry.store import Registry
    from llava_cmoe.settings.recipes import override
    from llava_cmoe.settings.recorded import as_recorded
    from llava_cmoe.training.processes import processes

    recipe = as_recorded(override(Registry(run).recipe().model_dump(mode="json"), overrides or (), source=str(run)))
    console = Console(quiet=not processes().is_main_process)
    with ProgressLine(console) as line:
        calibration = probe_tasks(recipe, after, seeds, line)
    console.print(render(calibration))
    if out is not None and processes().is_main_process:
        write_atomically(out, f"{calibration.model_dump_json(indent=1)}\n".encode())


@app.command()
@user_errors()
def merge(
    run: RunFolder,
    bound: Annotated[
        float,
        decimal("--bound", "Most by which a task's loss may rise, in nats per answer token.", least=0, most=1e9),
    ] = 0.02,
    rows: Annotated[int, whole("--rows", "Rows per task, never learned, to measure that on, at most.", least=1)] = 200,
) -> None:
    """Leave out experts that are little used or like another one, as many as every task bears.

    What was learned stays as it is: the merge is an entry of its own in RUN/merges, and deleting it takes it back. It
    is checked on training rows that the run did not learn, so the run needs a data.train_rows below their number.
    """
    from llava_cmoe.cli.progress import ProgressLine
    from llava_cmoe.merging.search import merge_run, render
    from llava_cmoe.registry.run_lock import writing
    from llava_cmoe.registry.store import Registry

    console = Console()
    with writing(run), ProgressLine(console) as line:
        record, folder = merge_run(Registry(run).recipe(), bound, rows, line)
    console.print(render(record))
    console.print(f"In {folder}: merge.json, answers/", highlight=False, soft_wrap=True)


@app.command()
@user_errors()
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
    from llava_cmoe.analyses.unseen import check_unseen, measure_unseen, render
    from llava_cmoe.cli.progress import ProgressLine
    from llava_cmoe.data.sequences import load_sequence
    from llava_cmoe.pocket.root import make_pocket_root
    from llava_cmoe.pocket.tasks import UNSEEN
    from llava_cmoe.provenance.files import write_atomically
    from llava_cmoe.registry.store import Registry

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
        write_atomically(out, f"{results.model_dump_json(indent=1)}\n".encode())


@app.command()
@user_errors()
def chat(
    run: RunFolder,
    image: Annotated[
        Path | None, typer.Option(help="Picture to talk about; none for questions of text alone.", metavar="FILE")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="One question; without it, questions are read until `exit`.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSON lines with question and image, answered as JSON lines.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The answer to --prompt as one JSON object.")] = False,
    route: Annotated[
        str, typer.Option(help="Whose routers answer: located, oracle:TASK, or base for the model without experts.")
    ] = "located",
    alone: Annotated[
        bool, typer.Option("--alone", help="Ask each question alone, not after what was said before.")
    ] = False,
    after: Annotated[
        int | None, whole("--after", "The model as it was after its first N stages; as it is now if absent.", least=0)
    ] = None,
    merge: Annotated[int | None, whole("--merge", "With the experts that merge N of the run leaves.", least=1)] = None,
) -> None:
    r"""Ask a run about a picture, or none; it says which task it took the question for, and answers.

    Questions are best asked as the tasks ask them, with the instruction on a line of its own (write \n before it).

    Example: llava-cmoe chat runs/pocket_cmoe --image picture.png
    """
    import json
    import sys

    from llava_cmoe.chat.opening import check_picture, names_of
    from llava_cmoe.chat.questions import Asked, read_questions
    from llava_cmoe.chat.session import open_session
    from llava_cmoe.chat.talk import Talk, TalkError, task_of
    from llava_cmoe.chat.talk import as_json as told
    from llava_cmoe.chat.terminal import converse, history_file, reader, say

    if prompt is not None and questions is not None:
        raise typer.BadParameter("--prompt and --questions: give one of them")
    if as_json and prompt is None:
        raise typer.BadParameter("--json: it is of the answer to --prompt; --questions is answered in JSON anyway")
    if image is not None and questions is not None:
        raise typer.BadParameter("--image: each line of --questions names its own picture")
    asked = [] if questions is None else read_questions(questions)
    for picture in dict.fromkeys(one.image for one in (Asked("", image), *asked) if one.image is not None):
        check_picture(run, picture)
    try:
        task_of(route, names_of(run, after))  # before a model is loaded
    except TalkError as error:
        raise typer.BadParameter(f"--route: {error}") from error
    console, talk = Console(), Talk(open_session(run, after, merge), image, route, alone or bool(asked))
    for one in asked or ([Asked(prompt, image)] if as_json and prompt is not None else []):
        talk.image = one.image
        verdict, *pieces = talk.ask(one.question)
        answer = "".join(map(str, pieces)).strip()
        typer.echo(json.dumps(told(one.image, one.question, answer, verdict, talk.route)))  # type: ignore[arg-type]
    if asked or as_json:
        return
    if prompt is not None:
        say(console, talk, prompt)
    else:
        converse(console, talk, reader(talk, history_file()) if sys.stdin.isatty() else None)
