"""Every learned task is asked under every route, once."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import PartialState
from cells import FACTS
from torch import Tensor

from llava_cmoe.evaluation.aggregate import aggregate
from llava_cmoe.evaluation.eval_spec import EvalSpec, eval_sets_of
from llava_cmoe.evaluation.generate import EvalModel
from llava_cmoe.evaluation.log import comparable
from llava_cmoe.evaluation.runner import evaluate_after
from llava_cmoe.evaluation.scoring import score_after
from llava_cmoe.methods.base import DeferredLocation
from llava_cmoe.records import Located
from llava_cmoe.settings.evaluation import EvaluationSettings


@dataclass
class LastTask:
    """Locates every prompt at the task learned last; records whose routers answer."""

    newest: int
    locates: bool = True
    answers_by_task: bool = False
    answered_by: list[int] = field(default_factory=list)

    @contextmanager
    def answering(self, batch: Mapping[str, Tensor], task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        located = self.locate(batch) if task_B is None else None
        self.answered_by.extend((task_B if located is None else located.task_B).tolist())
        yield lambda: located

    def locate(self, batch: Mapping[str, Tensor]) -> Located:
        num_samples = len(batch["input_ids"])
        return Located.at(torch.full((num_samples,), self.newest), torch.zeros(num_samples, self.newest + 1))


def test_a_run_is_asked_every_learned_task_under_every_route_and_only_once(
    eval_spec: EvalSpec, tiny_llava: Any, tiny_processor: Any
) -> None:
    questions = eval_sets_of(eval_spec, tiny_processor)
    labels: list[tuple[str, int, int]] = []
    for after in range(2):
        eval_model = EvalModel(LastTask(after), tiny_llava, tiny_processor)
        evaluate_after(eval_spec, questions, eval_model, after, PartialState(), lambda *step: labels.append(step))
    cells = score_after(eval_spec, 1)
    assert [(cell.after, cell.task, cell.route, len(cell.scores)) for cell in cells] == [
        (1, 0, "located", 4), (1, 1, "located", 4), (1, 0, "oracle", 4), (1, 1, "oracle", 4),
    ]  # fmt: skip
    assert labels[:4] == [
        ("GQA (located)", 3, 4),
        ("GQA (located)", 4, 4),
        ("GQA (oracle)", 3, 4),
        ("GQA (oracle)", 4, 4),
    ]
    files = sorted(str(path.relative_to(eval_spec.folder)) for path in eval_spec.folder.rglob("*.*"))
    assert files == [
        "after_01/GQA.located.jsonl", "after_01/GQA.oracle.jsonl",
        "after_02/GQA.located.jsonl", "after_02/GQA.oracle.jsonl",
        "after_02/Grounding.located.jsonl", "after_02/Grounding.oracle.jsonl",
    ]  # fmt: skip

    unasked = replace(eval_model, model=None)  # any generation would now fail
    evaluate_after(eval_spec, questions, unasked, 1, PartialState())
    assert score_after(eval_spec, 1) == cells
    results = aggregate(eval_spec, FACTS, range(2))
    assert results.locator is not None and results.locator.accuracy == {"GQA": 0.0, "Grounding": 100.0}

    shutil.rmtree(eval_spec.folder / "after_02")  # an evaluation done again gives the same results
    evaluate_after(eval_spec, questions, eval_model, 1, PartialState())
    assert comparable(aggregate(eval_spec, FACTS, range(2))) == comparable(results)


def test_oracle_asks_the_true_task_and_random_any_task_learned_so_far(
    eval_spec: EvalSpec, tiny_llava: Any, tiny_processor: Any
) -> None:
    questions = eval_sets_of(eval_spec, tiny_processor)
    answered_by: dict[str, list[int]] = {}
    for route in ("located", "oracle", "random"):
        method = LastTask(1)
        asked = replace(eval_spec, settings=EvaluationSettings(routes=(route,)))
        evaluate_after(asked, questions, EvalModel(method, tiny_llava, tiny_processor), 1, PartialState())
        answered_by[route] = method.answered_by
    assert answered_by["located"] == [1] * 8
    assert answered_by["oracle"] == [0] * 4 + [1] * 4
    assert set(answered_by["random"]) == {0, 1}
