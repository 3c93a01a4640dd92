"""What a chat remembers: the picture, what was said about it, whose routers answer, and the last answer."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_cmoe.chat.location import Verdict
from llava_cmoe.chat.session import BASE, ChatSession, Reply
from llava_cmoe.data.rows import Turn
from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.settings.base import shown

LOCATED, ORACLE, BASE_ROUTE = "located", "oracle", "base"


class TalkError(ValueError):
    """What cannot be done, and what can."""


class Talk:
    """One conversation after another with a run."""

    def __init__(self, session: ChatSession, image: Path | None = None, route: str = LOCATED, alone: bool = False):
        """Begin one.

        Args:
            session: the run.
            image: what it is about.
            route: as `set_route` takes it.
            alone: whether each question is asked alone, as tasks ask theirs, instead of after what was said before.

        Raises:
            TalkError: there is no such route.
        """
        self.session, self.image, self.alone = session, image, alone
        self.turns: list[Turn] = []
        self.said: list[dict[str, Any]] = []
        self.last: Reply | None = None
        self._task: int | None = None
        self.route = LOCATED
        self.set_route(route)

    def ask(self, text: str) -> Generator[Verdict | str | None]:
        r"""The verdict on a question, then pieces of its answer; a typed `\n` begins a line, as instructions do.

        An answer that is not read to its end is not remembered.

        Raises:
            DataError: as `ChatSession.ask`.
        """
        text = text.replace(r"\n", "\n")
        reply = self.last = self.session.ask(self.image, text, () if self.alone else self.turns, self._task)
        yield reply.verdict
        answer = ""
        for piece in reply.pieces:
            answer += piece
            yield piece
        self._remember(text, answer.strip(), reply.verdict)

    def stop(self) -> None:
        """End the answer that is being given; what is left of it is thrown away."""
        if self.last is not None:
            self.last.stop.set()
            for _ in self.last.pieces:
                pass

    def look_at(self, image: Path | None) -> None:
        """Talk about another picture, or none.

        Raises:
            DataError: as `ChatSession.check_picture`.
        """
        if image is not None:
            self.session.check_picture(image)
        self.image = image
        self.reset()

    def set_route(self, route: str) -> None:
        """Let the located task answer (`located`), a named one (`oracle:TASK`), or the base model (`base`).

        Raises:
            TalkError: it is none of these, or the run answers alike for all tasks.
        """
        self._task = task_of(route, self.session.tasks)
        self.route = route

    def reset(self) -> None:
        """Forget what was said; the picture and the route stay."""
        self.turns, self.last = [], None

    def used(self) -> Mapping[str, Mapping[int, float]]:
        """Experts that the last answer used, as `Reply` has them."""
        if self.last is None:
            raise TalkError("nothing was asked yet")
        return self.last.used()

    def save(self, path: Path) -> None:
        """Write all that was said as JSON lines; a file that is there is not replaced.

        Raises:
            TalkError: it is there, or nothing was said.
            OSError: it cannot be written.
        """
        if path.exists():
            raise TalkError(f"{path} is there already; name another file")
        if not self.said:
            raise TalkError("nothing was said yet")
        write_atomically(path, "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in self.said).encode())

    def _remember(self, text: str, answer: str, verdict: Verdict | None) -> None:
        self.turns += [{"role": "user", "text": text}, {"role": "assistant", "text": answer}]
        self.said.append(as_json(self.image, text, answer, verdict, self.route))


def task_of(route: str, tasks: Sequence[str]) -> int | None:
    """Index of the task whose routers answer, `BASE`, or None for the one that will be located.

    Args:
        route: as `Talk.set_route` takes it.
        tasks: names of the tasks that can be named; none of a run that answers alike for all.

    Raises:
        TalkError: as there.
    """
    kind, _, name = route.partition(":")
    if route == LOCATED:
        return None
    if not tasks:
        raise TalkError("this run answers alike for all tasks; there is no other route")
    if route == BASE_ROUTE:
        return BASE
    if kind == ORACLE and name in tasks:
        return list(tasks).index(name)
    names = ", ".join(f"{ORACLE}:{task}" for task in tasks)
    raise TalkError(f"no route {shown(route)}; there is {LOCATED}, {BASE_ROUTE}, {names}")


def as_json(image: Path | None, text: str, answer: str, verdict: Verdict | None, route: str) -> dict[str, Any]:
    """A question and its answer, as programs read them."""
    return {
        "image": None if image is None else str(image),
        "question": text,
        "answer": answer,
        "route": route,
        "located": None if verdict is None else verdict.task,
        "scores": None if verdict is None else dict(verdict.scores),
    }
