"""The chat as a terminal shows it: which task was located, then the answer word by word.

Locating and answering are `session.py`'s.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from llava_cmoe.chat.session import ChatSession, Verdict

GOODBYE = "exit"
"""Ends the chat, as Ctrl-D and Ctrl-C do."""


def answer(console: Console, session: ChatSession, image: Path | None, question: str) -> None:
    r"""Print the verdict, then the answer while it is generated; a typed `\n` begins a line, as instructions do."""
    reply = session.ask(image, question.replace(r"\n", "\n"))
    console.print(describe(reply.verdict), style="dim", markup=False, highlight=False, soft_wrap=True)
    for piece in reply.pieces:
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()


def converse(console: Console, session: ChatSession, image: Path | None) -> None:
    """Answer one question after another about the same picture, or none, until `exit` or the end of the input."""
    topic = "anything" if image is None else image
    console.print(
        f"Ask about {topic}; {GOODBYE} or Ctrl-D ends the chat.", markup=False, highlight=False, soft_wrap=True
    )
    while True:
        try:
            question = console.input(Text("you: ", style="bold")).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question == GOODBYE:
            return
        if question:
            answer(console, session, image, question)


def describe(verdict: Verdict | None) -> str:
    """The verdict in one line; lower scores are closer, and a task's own prompts have a z-score of 0 on average."""
    if verdict is None:
        return "(this method locates no task)"
    if not verdict.scores:
        return "(no task is learned yet: the base model answers)"
    closest, score = next(iter(verdict.scores.items()))
    if verdict.task is None:
        return f"(no task fits: the base model answers; the closest is {closest}, score {score:.1f})"
    return f"(located: {verdict.task}, score {score:.1f})"
