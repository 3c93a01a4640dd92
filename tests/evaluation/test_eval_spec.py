"""What is asked has one place per cell, is known to be answered or not, and is refused where nobody judges it."""

from dataclasses import replace

import pytest
from cells import SEQUENCE, write_cell

from llava_cmoe.evaluation.eval_spec import EvalSpec, answered, complete, discard_answers
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.evaluation import EvaluationSettings


def test_answers_files_are_laid_out_by_the_task_learned_last(eval_spec: EvalSpec) -> None:
    assert eval_spec.answers_path(2, 1, "oracle") == eval_spec.folder / "after_03" / "Grounding.oracle.jsonl"


def test_forgetting_a_row_forgets_those_below_it_and_none_above(eval_spec: EvalSpec) -> None:
    for after in range(3):
        write_cell(eval_spec, after, 0, ["cat"] * 4, [0] * 4)
    discard_answers(eval_spec, 1)
    discard_answers(eval_spec, 1)  # nothing there is no error
    assert [path.name for path in eval_spec.folder.iterdir()] == ["after_01"]


def test_a_task_that_the_headlines_protocol_does_not_judge_is_refused_before_anything_is_learned(
    eval_spec: EvalSpec,
) -> None:
    unjudged = SEQUENCE.model_copy(update={"tasks": (SEQUENCE.tasks[0].model_copy(update={"scorer": "numeric"}),)})
    with pytest.raises(RecipeError, match="'numeric' in protocol coin"):
        replace(eval_spec, sequence=unjudged, settings=EvaluationSettings(protocol="coin"))


def test_a_row_is_answered_when_every_learned_task_is_under_every_route(eval_spec: EvalSpec) -> None:
    places = [(task, route) for route in eval_spec.settings.routes for task in range(2)]
    for number, (task, route) in enumerate(places):
        assert complete(eval_spec, 1) == places[:number] and not answered(eval_spec, 1)
        write_cell(eval_spec, 1, task, ["cat"] * 4, [None] * 4, route=route)
    assert complete(eval_spec, 1) == places and answered(eval_spec, 1)
    assert not answered(eval_spec, 0) and not answered(eval_spec, 2)
