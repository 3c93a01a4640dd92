"""Answers after a task: every task so far, under every route.

From a model to `results.json` there are four steps: generate (`generate.py`), extract (inside the scorers), score
(`scoring.py`), aggregate (`aggregate.py`). Generating is the only one that needs the model: scores are always computed
from the answers files, so a corrected scorer costs no generation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from llava_cmoe.evaluation.eval_spec import EvalSpec
from llava_cmoe.evaluation.generate import EvalModel, EvalSet, Route, generate_answers
from llava_cmoe.evaluation.known import known_answers
from llava_cmoe.evaluation.parts import Processes


def evaluate_after(
    eval_spec: EvalSpec,
    questions: Mapping[str, EvalSet],
    eval_model: EvalModel,
    after: int,
    processes: Processes,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Ask every task learned so far, under every route; all processes call this together.

    What was already answered is not asked again, so calling this twice costs nothing.

    Args:
        eval_spec: what is asked, and where the answers go.
        questions: from `eval_sets_of`.
        eval_model: the model as it is after task `after`.
        after: index of the task learned last.
        processes: those that share the work.
        progress: called with a label, the samples done and all samples of this process.
    """
    for task, spec in enumerate(eval_spec.sequence.tasks[: after + 1]):
        for name in eval_spec.settings.routes:
            generate_answers(
                eval_model,
                questions[spec.name],
                Route(name, task_index=task, num_known=after + 1, seed=eval_spec.seed),
                eval_spec.answers_path(after, task, name),
                batch_size=eval_spec.settings.batch_size,
                processes=processes,
                known=partial(known_answers, eval_spec, eval_model.method, after, task),
                progress=partial(_report, progress, spec.name),
            )


def _report(progress: Callable[[str, int, int], None], task: str, what: str, done: int, total: int) -> None:
    progress(f"{task} ({what})", done, total)
