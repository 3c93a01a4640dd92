import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from llava_cmoe.chat import terminal
from llava_cmoe.chat.session import Reply, Verdict
from llava_cmoe.chat.terminal import converse, describe

PICTURE = Path("picture.png")


class Parrot:
    """Stands in for a session: says the question back, one word at a time."""

    def ask(self, image: Path, question: str) -> Reply:
        assert image == PICTURE
        return Reply(Verdict("gqa", {"gqa": 0.25, "vqa": 7.0}), self._words(question))

    def _words(self, question: str) -> Iterator[str]:
        for word in question.split():
            yield f"[{word}] "


def chatted(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What is printed while a person types some lines, then Ctrl-D."""
    typed = iter(lines)

    def read(*_: object) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(console, "input", read)
    converse(console, Parrot(), PICTURE)  # type: ignore[arg-type]
    assert next(typed, None) in (None, "never read")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_task_stands_before_the_answer(monkeypatch):
    said = chatted(["what is", "", "it"], monkeypatch)
    assert said.splitlines()[1:5] == ["(located: gqa, score 0.2)", "[what] [is] ", "(located: gqa, score 0.2)", "[it] "]


def test_an_instruction_can_stand_on_its_own_line(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(Parrot, "_words", lambda self, question: iter(asked.append(question) or []))
    chatted([r"What is it?\nAnswer with one word."], monkeypatch)
    assert asked == ["What is it?\nAnswer with one word."]


def test_exit_ends_the_chat(monkeypatch):
    assert "located" not in chatted(["exit", "never read"], monkeypatch)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (None, "locates no task"),
        (Verdict(None, {}), "no task is learned yet"),
        (Verdict(None, {"gqa": 9.0}), "no task fits: the base model answers; the closest is gqa, score 9.0"),
        (Verdict("gqa", {"gqa": -0.5}), "located: gqa, score -0.5"),
    ],
)
def test_every_verdict_has_its_words(verdict: Verdict | None, words: str):
    assert words in describe(verdict)
    assert terminal.GOODBYE not in describe(verdict)
