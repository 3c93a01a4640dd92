"""Every number of every command and script is a finite one within bounds; anything else is refused in one line."""

import inspect
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cmoe.cli import app
from llava_cmoe.cli.numbers import Number

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for folder in ("train", "eval") for path in (ROOT / folder).glob("*.py"))


def apps() -> Iterator[tuple[str, typer.Typer]]:
    """The command, and each script that is one of its own."""
    yield "llava-cmoe", app
    for path in SCRIPTS:
        found = runpy.run_path(str(path), run_name="imported")
        if isinstance(made := found.get("app"), typer.Typer):
            yield path.name, made
        elif "typer" in found:
            made = typer.Typer(add_completion=False)
            made.command()(found["main"])
            yield path.name, made


def commands_of(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands_of(inner, (*words, name))
    if not hasattr(command, "commands"):
        yield words, command


def kinds_in(annotation: Any) -> set[Any]:
    return {annotation, *(kind for one in get_args(annotation) for kind in kinds_in(one))}


@cache
def options() -> dict[tuple[str, ...], tuple[Any, list[str]]]:
    """Every numeric option: where it is, the whole command, and what to type before it."""
    found = {}
    for name, made in apps():
        whole = typer.main.get_command(made)
        for words, command in commands_of(whole):
            hints = get_type_hints(inspect.unwrap(command.callback))
            numeric = {key for key, hint in hints.items() if {int, float} & kinds_in(hint)}
            needed = ["x" for one in command.params if one.param_type_name == "argument" and one.required]
            needed += [text for one in command.params if one.param_type_name != "argument" and one.required
                       for text in (one.opts[0], "x")]  # fmt: skip
            for option in (one for one in command.params if one.name in numeric):
                found[(name, *words, option.opts[0])] = (whole, [*words, *needed])
    return found


def given_to(place: tuple[str, ...], typed: str) -> int | str | None:
    command, words = options()[place]
    with pytest.raises(SystemExit) as left:
        command.main([*words, place[-1], typed], prog_name="command")
    return left.value.code


NO_NUMBER = ["inf", "-inf", "nan", "-1", str(10**20), "1e999", "-1e999", "9" * 5000, "", " ", "1_0", "0x1", "١", "a\nb",
             "\x1b[2J", "true", "1,5"]  # fmt: skip


def test_there_are_numbers_to_look_at():
    assert len(options()) > 20 and {"llava-cmoe", "speed.py", "pretrain_pocket.py"} <= {place[0] for place in options()}


@pytest.mark.parametrize("typed", NO_NUMBER, ids=lambda typed: repr(typed)[:12])
def test_what_is_no_number_of_sense_is_refused_in_one_line(typed: str, capsys: pytest.CaptureFixture[str]):
    for place in options():
        assert given_to(place, typed) == 2
        out, told = capsys.readouterr()
        assert out == "" and told.startswith(f"error: {place[-1]}: expected a") and told.count("\n") == 1, (place, told)
        assert len(told) < 250 and "\x1b" not in told


@settings(max_examples=50)
@given(st.floats() | st.integers() | st.text(), st.booleans(), st.integers(-9, 9), st.integers(0, 99))
def test_a_number_is_taken_only_within_its_bounds(typed: object, whole: bool, least: int, width: int):
    number = Number("--n", least, least + width, whole)
    try:
        value = number(typed)
    except typer.Exit:
        assert not (isinstance(typed, int) and least <= typed <= least + width)
    else:
        assert least <= value <= least + width and value == float(str(typed)) and isinstance(value, int) == whole
