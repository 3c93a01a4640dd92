"""What need not be asked again: answers in the run's answers files to the same prompt, given by the same routers.

A method says what decides its answers, and hence which of them stand:

    answers by task     prompt and task: answers after any task so far, on any route
    does not locate     prompt and model: answers after the same task, on any route
    neither             a router's verdict, too, that no file holds: none

What is known depends only on which files are complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

from llava_cmoe.evaluation.eval_spec import EvalSpec
from llava_cmoe.evaluation.generate import Answering, Known, Route, RouteName
from llava_cmoe.evaluation.log import Answer, read_answers


def known_answers(eval_spec: EvalSpec, method: Answering, after: int, task: int) -> Known:
    """What the method would answer to a task's questions after task `after`, as far as files hold it.

    A question that could not be answered counts as answered so: it is not tried again.
    """
    known: dict[tuple[str, int | None], Answer] = {}
    for path, route in _files(eval_spec, method, after, task):
        for answer in read_answers(path):
            given = answer.located if route.name == "located" else route.task_of(answer.id)
            key = answer.id, given if method.locates else None
            known.setdefault(key, replace(answer, located=None, score=None))
    return known


def _files(eval_spec: EvalSpec, method: Answering, after: int, task: int) -> Iterator[tuple[Path, Route]]:
    """Complete answers files that hold such answers, and the route of each."""
    if method.locates and not method.answers_by_task:
        return
    # Answers from before the task was learned may have been brought along from another model.
    for row in range(task if method.answers_by_task else after, after + 1):
        for name in get_args(RouteName):
            path = eval_spec.answers_path(row, task, name)
            if path.exists():
                yield path, Route(name, task, num_known=row + 1, seed=eval_spec.seed)
