"""What every command says: results, problems, and one clear message for a user's mistake.

Ids, names, answers and paths are data, maybe a stranger's. Whatever is printed goes through `Console`, where nothing in
them is a command to the terminal or markup.

Imports wait until they are needed, as the commands' do.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
import typer
from rich.errors import MarkupError
from rich.segment import Segment
from rich.text import Text

from llava_cmoe.cli.signals import ending_in_one_line
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.evaluation import EvaluationSettings

if TYPE_CHECKING:
    from llava_cmoe.data.check_report import CheckReport
    from llava_cmoe.data.problems import Problem
    from llava_cmoe.data.tasks import TaskSequence
    from llava_cmoe.evaluation.log import Results

NUM_LISTED = 20
"""Problems that are spelled out; a data root that is wrong in one way has thousands of them."""


NUMBERS = r"(?:[-\d\s.,()–−+±%:/]|\bto\b)+"
OWN_MARKUP = re.compile(rf"(\[bold\])?{NUMBERS}(\[/bold\])?(\n\[dim\]{NUMBERS}\[/dim\])?")
"""Numbers, which tables set in bold or dim; any other text is shown as it stands."""

TURNING = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u2028", "\u2029"}
"""Characters that let text be shown in another order, or begin a line."""


class Console(rich.console.Console):
    """Shows text as it stands: characters that a terminal obeys are spelled out, brackets are brackets."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text; markup counts around numbers alone, as in tables."""
        plain = {**options, "markup": False, "emoji": False}
        try:
            return super().render_str(text, **plain | {"markup": OWN_MARKUP.fullmatch(text) is not None})
        except MarkupError:
            return super().render_str(text, **plain)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        shown = (part if part.control else part._replace(text=spelled_out(part.text)) for part in buffer)
        return super()._render_buffer(shown)


def spelled_out(text: str) -> str:
    """The text, in which whatever a terminal would obey, or no file can hold, is spelled as in a Python string."""
    return "".join(
        one.encode("unicode_escape").decode()
        if (unicodedata.category(one) in ("Cc", "Cs") and one not in "\n\t") or one in TURNING
        else one
        for one in text
    )


class _Said(logging.Handler):
    """What the library warns of, on the same way to the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show the message alone."""
        Console(stderr=True).print(record.getMessage(), highlight=False, soft_wrap=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Keep other libraries' chatter off the screen; a user's mistake becomes one message and exit status 2."""
    with ending_in_one_line(), _errors():
        yield


@contextmanager
def _errors() -> Iterator[None]:
    _hush()
    from transformers.utils.logging import disable_progress_bar

    from llava_cmoe.backbones.loading import BackboneError
    from llava_cmoe.data.problems import DataError
    from llava_cmoe.evaluation.log import LogError
    from llava_cmoe.provenance.invocations import ManifestError
    from llava_cmoe.registry.schema import RegistryError
    from llava_cmoe.training.finite import NotFiniteError
    from llava_cmoe.training.processes import LaunchError

    disable_progress_bar()  # type: ignore[no-untyped-call]
    of_files = (DataError, RegistryError, ManifestError, LogError, BackboneError)
    try:
        yield
    except (RecipeError, *of_files, LaunchError, NotFiniteError, OSError) as error:
        say(Console(stderr=True), "error:", _reason(error), "bold red")
        raise typer.Exit(2) from error


def _reason(error: Exception) -> str:
    """What went wrong, in one line where the system says it: a full disk, a read-only folder, a file for a folder."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    named = error.filename if error.filename2 is None else error.filename2
    place = "" if named is None else f"{os.fsdecode(named) if isinstance(named, (str, bytes)) else named}: "
    return f"{place}{error.strerror}; mend that and give the same command again, what was finished is kept"


def say(console: Console, label: str, text: str, style: str) -> None:
    """One message behind a label in a style."""
    console.print(Text.assemble((label, style), " ", text), highlight=False, soft_wrap=True)


def _hush() -> None:
    """Silence three warnings that no user of this command can act on; to be called before these libraries load."""
    if not (logger := logging.getLogger("llava_cmoe")).handlers:
        logger.addHandler(_Said())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # no kernels for 4-bit models on a CPU, asked for or not
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT to transformers


def _is_news(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def show(console: Console, runs: Sequence[Results]) -> None:
    """Each run's matrix of its headline route and last row per protocol, then the metrics of all runs and routes."""
    from llava_cmoe.report.tables import matrix_table, metrics_table, protocols_table

    for results in runs:
        console.print(matrix_table(results))
        if compared := protocols_table(results):
            console.print(compared)
    console.print(metrics_table(runs))


def unknown_scorers(sequence: TaskSequence) -> list[Problem]:
    """Tasks whose answers nobody here could judge."""
    from llava_cmoe.data.problems import Problem
    from llava_cmoe.evaluation.scorers import get_scorer

    problems = []
    for task in sequence.tasks:
        try:
            get_scorer(task.scorer, EvaluationSettings())
        except RecipeError as error:
            problems.append(Problem(Path(sequence.name), f"task {task.name}: {error}"))
    return problems


def show_check(console: Console, report: CheckReport, processor: Any) -> None:
    """What a check counted, what a reader of the counts should know, an example of each task, and the verdict."""
    from llava_cmoe.data.check_report import remarks, render
    from llava_cmoe.data.conversation import ChatTemplateError
    from llava_cmoe.data.encoding import Encoding
    from llava_cmoe.data.example import pieces_of, render_pieces
    from llava_cmoe.data.problems import DataError

    console.print(render(report))
    for remark in remarks(report):
        console.print(f"  {remark}", markup=False, highlight=False, soft_wrap=True)
    for task in (task for task in report.tasks if task.name in report.examples):
        read = report.examples[task.name]
        try:
            pieces = pieces_of(read.row, Encoding(processor, task.geometry))
        except (DataError, ChatTemplateError):  # among the problems
            continue
        learned = sum(piece.tokens for piece in pieces if piece.learned)
        total = sum(piece.tokens for piece in pieces)
        title = f"{task.name}, row {read.index}: ⟦{learned} tokens⟧ of {total} are learned"
        console.print(title, style="bold", markup=False, highlight=False)
        console.print(render_pieces(pieces), soft_wrap=True)
    list_problems(console, "asked although it is learned, which proves little", report.overlaps)
    list_problems(console, "training would stop at", report.problems)
    wrong = len(report.problems)
    verdict = "training and evaluation can read everything" if report.ok else f"training would fail: {wrong:,} problems"
    console.print(verdict, style="green" if report.ok else "bold red", highlight=False)


def list_problems(console: Console, title: str, problems: Sequence[Problem]) -> None:
    """The first problems, one a line, and how many more there are; one that many rows of a file have is told once."""
    if problems:
        console.print(title, style="bold", highlight=False)
    alike: dict[tuple[Path, str], list[Problem]] = {}
    for problem in problems:
        alike.setdefault((problem.file, problem.reason), []).append(problem)
    for first, *others in list(alike.values())[:NUM_LISTED]:
        more = f" (and {len(others):,} rows more)" if others else ""
        console.print(f"  {first}{more}", markup=False, highlight=False, soft_wrap=True)
    if len(alike) > NUM_LISTED:
        console.print(f"  and {len(alike) - NUM_LISTED:,} more", highlight=False)
