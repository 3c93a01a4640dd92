"""The chat as a terminal shows it: which task was located, then the answer word by word; and what may be typed.

What a chat remembers is `talk.py`'s, locating and answering `session.py`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from rich.console import Console
from rich.text import Text

from llava_cmoe.chat.location import Verdict
from llava_cmoe.chat.talk import BASE_ROUTE, LOCATED, ORACLE, Talk, TalkError
from llava_cmoe.data.problems import DataError
from llava_cmoe.report.figures import site_label

GOODBYE = "exit"
"""Ends the chat, as Ctrl-D does."""

COMMANDS = {
    "/image": "FILE: talk about another picture, or none where no file is named",
    "/route": f"{LOCATED}, {ORACLE}:TASK or {BASE_ROUTE}: whose routers answer from here on",
    "/why": "where the last question was located, and which experts it and its answer used",
    "/reset": "forget what was said",
    "/save": "FILE: write all that was said as JSON lines",
    "/help": "this",
}
"""What may be typed besides questions."""

Read = Callable[[], str]
"""Returns the next line that was typed; EOFError at the end."""


def say(console: Console, talk: Talk, question: str) -> None:
    """Print the verdict, then the answer while it is generated; Ctrl-C ends the answer, and it is not remembered."""
    spoken = talk.ask(question)
    try:
        verdict = next(spoken)
        assert not isinstance(verdict, str), "the verdict comes first"
        told = f"({talk.route})" if verdict is None and talk.route != LOCATED else describe(verdict)
        console.print(told, style="dim", markup=False, highlight=False, soft_wrap=True)
        for piece in spoken:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
    except KeyboardInterrupt:
        talk.stop()
        console.print("\n(stopped)", style="dim", markup=False, highlight=False)
    finally:
        spoken.close()


def converse(console: Console, talk: Talk, read: Read | None = None) -> None:
    """Answer one question after another until `exit` or the end of the input; what is wrong is said, and it goes on."""
    topic = "anything" if talk.image is None else talk.image
    _tell(console, f"Ask about {topic}; /help says what else can be typed, {GOODBYE} or Ctrl-D ends the chat.")
    read = read or (lambda: console.input(Text("you: ", style="bold")))
    while True:
        try:
            typed = read().strip()
        except KeyboardInterrupt:  # the line is dropped, the chat is not
            console.print()
            continue
        except EOFError:
            console.print()
            return
        if typed == GOODBYE:
            return
        try:
            if typed.startswith("/"):
                obey(console, talk, typed)
            elif typed:
                say(console, talk, typed)
        except (DataError, TalkError, OSError) as error:
            _tell(console, str(error))


def obey(console: Console, talk: Talk, typed: str) -> None:
    """Do what a line that begins with a slash says.

    Raises:
        TalkError: there is no such command, or it cannot be done.
        DataError: there is something wrong with the picture.
    """
    command, _, word = (part.strip() for part in typed.partition(" "))
    if command == "/image":
        talk.look_at(Path(word).expanduser() if word else None)
        _tell(console, f"(about {word or 'nothing to see'}; what was said is forgotten)")
    elif command == "/route":
        talk.set_route(word)
        _tell(console, f"({talk.route})")
    elif command == "/why":
        _why(console, talk)
    elif command == "/reset":
        talk.reset()
        _tell(console, "(what was said is forgotten)")
    elif command == "/save":
        if not word:
            raise TalkError("/save FILE: name the file")
        talk.save(Path(word).expanduser())
        _tell(console, f"({word}: {len(talk.said)} answers)")
    elif command == "/help":
        for name, meaning in COMMANDS.items():
            _tell(console, f"{name} {meaning}")
    else:
        raise TalkError(f"no command {command}; there is {', '.join(COMMANDS)}")


def reader(talk: Talk, history: Path | None) -> Read:
    """Lines as a person types them: with what was typed before, and files, tasks and commands to complete."""
    kept: History = InMemoryHistory()
    if history is not None:
        history.parent.mkdir(parents=True, exist_ok=True)
        kept = FileHistory(str(history))
    session: PromptSession[str] = PromptSession("you: ", history=kept, completer=_Words(talk))
    return session.prompt


def history_file() -> Path:
    """Where a person's questions are kept between chats, as the XDG specification says."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "llava-cmoe/history"


class _Words(Completer):
    """Completes commands, and what follows them."""

    def __init__(self, talk: Talk) -> None:
        self._paths = PathCompleter(expanduser=True)
        named = [f"{ORACLE}:{task}" for task in talk.session.tasks]
        routes = [LOCATED, *([BASE_ROUTE, *named] if named else [])]
        self._routes, self._commands = WordCompleter(routes, WORD=True), WordCompleter(list(COMMANDS), WORD=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent):  # type: ignore[no-untyped-def]
        """Nothing for a question."""
        command, blank, word = document.text_before_cursor.partition(" ")
        if not command.startswith("/"):
            return
        completer = {"/image": self._paths, "/save": self._paths, "/route": self._routes}.get(command)
        if not blank:
            yield from self._commands.get_completions(document, complete_event)
        elif completer is not None:
            found: list[Completion] = list(completer.get_completions(Document(word), complete_event))
            yield from found


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


def _why(console: Console, talk: Talk) -> None:
    """Scores of all tasks, and the experts of each site by what they were used."""
    used = talk.used()
    verdict = talk.last.verdict if talk.last is not None else None
    if verdict is None:
        _tell(console, f"route {talk.route}: nothing was located")
    else:
        _tell(console, f"{describe(verdict)[1:-1]}; scores, the closest first:")
        for task, score in verdict.scores.items():
            _tell(console, f"  {task} {score:.1f}")
    _tell(console, "experts by share of use, by site:" if used else "no experts took part")
    for site, shares in used.items():
        _tell(console, f"  {site_label(site)}: {in_words(shares)}")


def in_words(shares: Mapping[int, float]) -> str:
    """The experts that were used at all, the most used first."""
    most = sorted(((share, -expert) for expert, share in shares.items() if share > 0), reverse=True)
    return ", ".join(f"{-expert} {100 * share:.0f} %" for share, expert in most) or "none"


def _tell(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
