"""Nothing that files or people bring along commands the terminal, and brackets in it are brackets."""

import io
import json
import logging
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from commands import type_in
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from tiny import Lesson

from llava_cmoe.chat.location import Verdict
from llava_cmoe.chat.talk import Talk
from llava_cmoe.chat.terminal import converse, describe
from llava_cmoe.cli import console as said
from llava_cmoe.cli.console import Console, list_problems, say, spelled_out, user_errors
from llava_cmoe.cli.progress import ProgressLine, StudyLine
from llava_cmoe.data.problems import Problem
from llava_cmoe.provenance.invocations import bind_results
from llava_cmoe.report.tables import above, number, span
from llava_cmoe.settings.base import RecipeError

PIECES = ["\x1b[2J", "\x1b]0;owned\x07", "\x9b31m", "\r", "\b", "\0", "\u202e", "\u2066", "\ud800", "\u2028", "\x7f"]
PIECES += ["[/b]", "[bold]", "[/]", "[link=http://x]", "[red]x[/red]", "\\[b]", ":smile:", "plain", "ü", "日本", "[1]"]
HOSTILE = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)


def printed(show: Callable[[Console], object], terminal: bool = False) -> str:
    stream = io.StringIO()
    show(Console(file=stream, width=400, force_terminal=terminal, color_system=None))
    return stream.getvalue()


def harmless(text: str) -> bool:
    return (
        all(one == "\n" or unicodedata.category(one) not in ("Cc", "Cs") for one in text)
        and not set(text) & said.TURNING
    )


def table_of(text: str) -> Table:
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    table.add_row(Text(text))
    return table


WAYS: dict[str, Callable[[Console, str], object]] = {
    "print": lambda console, text: console.print(f"In {text}: results.json", soft_wrap=True),
    "style": lambda console, text: console.print(text, style="bold red", highlight=False),
    "warning": lambda console, text: say(console, "warning:", text, "bold yellow"),
    "table": lambda console, text: console.print(table_of(text)),
    "problems": lambda console, text: list_problems(console, text, [Problem(Path("f"), text, 1, text)]),
    "verdict": lambda console, text: console.print(describe(Verdict(text, {text: 1.0}))),
}


@given(st.sampled_from(sorted(WAYS)), HOSTILE, st.booleans())
def test_text_is_shown_as_it_stands_and_never_obeyed(way: str, text: str, terminal: bool):
    shown = printed(lambda console: WAYS[way](console, text), terminal)
    assert harmless(shown)
    assert all(piece in shown for piece in PIECES if piece in text and piece.isprintable())


@settings(max_examples=30)
@given(HOSTILE)
def test_progress_lines_obey_nothing(text: str):
    def run(console: Console) -> None:
        with ProgressLine(console) as line:
            line(text, text, 1, 1)
        with StudyLine(console, 1) as bar:
            bar.moved(0.5, [text])
            bar.ended(text, 1.0, text)

    assert harmless(printed(run)) and spelled_out("[/b]") == "[/b]"
    live = printed(run, terminal=True)
    assert not any(piece in live for piece in PIECES[:2] + PIECES[6:9])


@settings(max_examples=20)
@given(HOSTILE)
def test_errors_and_warnings_obey_nothing(text: str):
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        with pytest.raises(typer.Exit), user_errors():
            logging.getLogger("llava_cmoe.somewhere").warning("%s is odd", text)
            raise RecipeError(f"{text} is wrong")
    assert harmless(stream.getvalue())
    assert [line.endswith((" is odd", " is wrong")) for line in stream.getvalue().splitlines()] == [True, True]


class Silent:
    """A session with a run that has no tasks."""

    tasks = ()


def test_what_is_asked_for_in_a_chat_obeys_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("builtins.input", lambda: "exit")
    assert harmless(printed(lambda console: converse(console, Talk(Silent(), Path("\x1b[2J[/b].png")))))  # type: ignore[arg-type]


@given(st.floats(-999, 999), st.floats(0, 99))
def test_numbers_in_tables_keep_their_weight(value: float, other: float):
    cell = f"[bold]{value:.1f}[/bold]\n[dim]{other:.0f}–{other:.0f}[/dim]"
    text = Console(file=io.StringIO()).render_str(cell, highlight=False)
    assert [span.style for span in text.spans] == ["bold", "dim"] and "[" not in text.plain


@pytest.mark.parametrize("name", ["[/b]", "[red]x[/red]", "[bold]", "\u202eexe", "a [link=http://x]b"])
def test_a_run_of_any_name_is_reported(lesson_of: Callable[[str], Lesson], tmp_path: Path, name: str):
    run = Path(shutil.copytree(lesson_of("cmoe").recipe.run, tmp_path / name.replace("/", "")))
    document = json.loads((run / "results.json").read_text()) | {"run": name.replace("/", "")}
    (run / "results.json").write_text(json.dumps(document))
    bind_results(run)
    for words in (("report", run), ("rescore", run)):
        told = type_in(*words)
        assert told.exit_code == 0 and harmless(told.output)
        assert spelled_out(name.replace("/", "")) in told.output


@given(st.floats(-100, 100), st.floats(0, 100), st.integers(0, 2))
def test_the_interval_below_a_number_is_shown_without_its_markup(low: float, width: float, digits: int):
    table = Table("bwt")
    table.add_row(above(number(low), (low, low + width), digits))
    shown = printed(lambda console: console.print(table))
    assert number(low) in shown and span((low, low + width), digits) in shown and "[" not in shown
