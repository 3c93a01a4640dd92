"""The page's examples: questions drawn by the hash of their ids, what each run answered, and small pictures.

Nothing is picked by how it was answered. Answers are shown as their files hold them; whether one is right is scored
again from the questions, but by no scorer that asks a server or starts another program.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from llava_cmoe.data.images import open_image
from llava_cmoe.data.problems import DataError
from llava_cmoe.data.rows import MARKER
from llava_cmoe.evaluation.log import Answer, Results, read_answers
from llava_cmoe.evaluation.scorers import get_scorer
from llava_cmoe.evaluation.scoring import score_answers
from llava_cmoe.report.reported import Reported

PER_TASK, IN_ALL = 8, 160
"""Examples, at most."""
SIDE = 120
"""Pixels of a thumbnail's longer side."""
PICTURE_BYTES = 1_000_000
"""Of all thumbnails, as they stand in the page."""
LONGEST = 400
"""Characters of a text that are shown."""
NOT_RUN = ("llm_judge", "captions")
"""Scorers that ask a server, or start another program; a report runs none of them."""


@dataclass(frozen=True)
class Shown:
    """One answer: its text, where it was located, and its score, None where it was not scored."""

    text: str
    located: str
    score: float | None

    @property
    def verdict(self) -> str:
        """`right` from half of the score on, `wrong` below; empty where there is none."""
        return "" if self.score is None else "right" if self.score >= 0.5 else "wrong"


@dataclass(frozen=True)
class Given:
    """What one run answered right after the task and at the end; None where it was not asked."""

    run: str
    first: Shown | None
    last: Shown | None

    @property
    def outcome(self) -> str:
        """What the page filters by."""
        before, after = (None if one is None else one.verdict for one in (self.first, self.last))
        return "forgotten" if before == "right" and after == "wrong" else after or ""


@dataclass(frozen=True)
class Example:
    """One question, with its picture as a data address (empty where there is none) and every run's answers."""

    task: str
    id: str
    question: str
    truth: str
    picture: str
    given: tuple[Given, ...]

    @property
    def outcomes(self) -> str:
        """Those of all runs, as a list of words."""
        return " ".join(sorted({one.outcome for one in self.given} - {""}))


def examples_of(runs: Sequence[Reported]) -> list[Example]:
    """Examples of every task; runs of the same data share them.

    Raises:
        LogError: a file of answers that is broken.
    """
    shared: dict[tuple[str, str], list[Reported]] = {}
    for run in runs:
        for task in run.results.tasks[: len(run.results.headline.matrix)]:
            shared.setdefault((run.results.data, task), []).append(run)
    num = max(1, min(PER_TASK, IN_ALL // max(1, len(shared))))
    found = [example for (_, task), those in shared.items() for example in _of_task(task, those, num)]
    return _within_budget(found[:IN_ALL])


def without_pictures(examples: Sequence[Example]) -> list[Example]:
    """The same, for a page that would be too large."""
    return [replace(example, picture="") for example in examples]


def _of_task(task: str, runs: Sequence[Reported], num: int) -> list[Example]:
    answered = {run.name: _answered(run, task) for run in runs}
    answers = {answer.id: answer for pair in answered.values() for one in reversed(pair) for answer in one.values()}
    drawn = sorted(answers, key=lambda name: hashlib.sha256(f"{task}/{name}".encode()).digest())[:num]
    scores = {run.name: [_scores(run, task, list(one.values())) for one in answered[run.name]] for run in runs}
    rows = next((_rows(run, task) for run in runs if run.examined is not None), {})
    examples = []
    for name in drawn:
        given = []
        for run in runs:
            shown = [
                None if name not in one else _shown(run.results, one[name], score.get(name))
                for one, score in zip(answered[run.name], scores[run.name], strict=True)
            ]
            given.append(Given(run.name, *shown))
        row = rows.get(name, {})
        question = answers[name].prompt.replace(MARKER, "").strip()
        picture = _thumbnail(row["image"]) if row.get("image") else ""
        examples.append(Example(task, name, shortened(question), shortened(_truth(row)), picture, tuple(given)))
    return examples


def _answered(run: Reported, task: str) -> tuple[dict[str, Answer], dict[str, Answer]]:
    """Id to answer, right after the task and at the end; empty where none are."""
    results = run.results
    index, last, route = results.tasks.index(task), len(results.headline.matrix) - 1, next(iter(results.routes))
    paths = [run.folder / "answers" / f"after_{row + 1:02d}" / f"{task}.{route}.jsonl" for row in (index, last)]
    first, final = ({one.id: one for one in read_answers(path)} if path.is_file() else {} for path in paths)
    return first, final


def _scores(run: Reported, task: str, answers: Sequence[Answer]) -> Mapping[str, float]:
    if run.examined is None or not answers:
        return {}
    spec = run.examined.eval_spec
    scorer = spec.sequence.tasks[spec.sequence.names.index(task)].scorer
    if scorer in NOT_RUN:
        return {}
    try:
        score = score_answers(answers, spec.rows[task], get_scorer(scorer, spec.settings), source=f"{run.name}, {task}")
    except ValueError:  # answers to other questions, as those of a part that was drawn anew
        return {}
    return dict(zip(spec.rows[task]["id"], score.values, strict=True))


def _shown(results: Results, answer: Answer, score: float | None) -> Shown:
    located = ""
    if answer.located is not None:
        located = results.tasks[answer.located] if 0 <= answer.located < len(results.tasks) else "the base model"
    text = answer.text if answer.failed is None else f"could not be answered: {answer.failed}"
    return Shown(shortened(text), located, score)


def _rows(run: Reported, task: str) -> dict[str, Mapping[str, Any]]:
    assert run.examined is not None, "asked before"
    return {row["id"]: row for row in run.examined.eval_spec.rows[task]}


def _truth(row: Mapping[str, Any]) -> str:
    """The answer, or the different ones of several people, the most frequent first."""
    several = [text for text, _ in Counter(row.get("answers") or ()).most_common()]
    return " / ".join(several) or row.get("answer") or ""


def shortened(text: str) -> str:
    """A text of a length that a page of many can bear."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


@cache
def _thumbnail(path: str) -> str:
    """The picture, small, in whichever of two formats is smaller; empty for one that cannot be opened."""
    try:
        picture = open_image(Path(path))
    except DataError:
        return ""
    picture.thumbnail((SIDE, SIDE))
    addresses = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 75, "optimize": True})):
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        addresses.append(f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}")
    return min(addresses, key=len)


def _within_budget(examples: Sequence[Example]) -> list[Example]:
    """Pictures as long as they fit, the others without; every task gets its first one before any gets its second."""
    place: dict[str, int] = {}
    order = []
    for index, example in enumerate(examples):
        order.append((place.setdefault(example.task, 0), index))
        place[example.task] += 1
    spent, kept = 0, set[int]()
    for _, index in sorted(order):
        if spent + len(examples[index].picture) <= PICTURE_BYTES:
            spent += len(examples[index].picture)
            kept.add(index)
    return [one if index in kept else replace(one, picture="") for index, one in enumerate(examples)]
