"""Answers are joined by id and scored from files alone."""

import pytest
from cells import make_rows, write_cell
from datasets import Dataset

from llava_cmoe.data.rows import EVAL_FEATURES
from llava_cmoe.evaluation.eval_spec import EvalSpec
from llava_cmoe.evaluation.log import Answer
from llava_cmoe.evaluation.scorers import get_scorer
from llava_cmoe.evaluation.scoring import score_after, score_answers
from llava_cmoe.settings.evaluation import EvaluationSettings


def test_a_cell_is_the_mean_score_in_percent_and_grounding_adds_the_mean_overlap(eval_spec: EvalSpec) -> None:
    write_cell(eval_spec, 1, 0, ["cat", "Cat.", "dog", ""], [0] * 4)
    write_cell(eval_spec, 1, 1, ["[0, 0, 1, 1]", "[0, 0, 1, 0.5]", "[0, 0, 1, 0.25]", "none"], [1] * 4)
    gqa, grounding = score_after(eval_spec, 1)
    assert (gqa.accuracy, dict(gqa.detail)) == (50.0, {})
    assert (grounding.accuracy, dict(grounding.detail)) == (
        50.0,
        {"iou": 0.4375, "at_0.3": 0.5, "at_0.5": 0.5, "at_0.7": 0.25, "at_0.9": 0.25},
    )


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        (["GQA-0", "GQA-1", "GQA-2"], "missing id 'GQA-3'"),
        (["GQA-0", "GQA-1", "GQA-2", "GQA-3", "GQA-1"], "doubled id 'GQA-1'"),
        (["GQA-0", "GQA-1", "GQA-2", "GQA-3", "x"], "unknown id 'x'"),
    ],
)
def test_a_missing_doubled_or_unknown_id_is_an_error_with_its_name(ids: list[str], complaint: str) -> None:
    answers = [Answer(sample_id, "cat", None, None, "?") for sample_id in ids]
    with pytest.raises(ValueError, match=f"a.jsonl: {complaint}"):
        score_answers(answers, make_rows("GQA"), get_scorer("gqa", EvaluationSettings()), source="a.jsonl")


def test_answers_are_joined_by_id_not_by_place() -> None:
    rows = Dataset.from_list(
        [{**make_rows("GQA")[0], "id": name, "answer": name} for name in ("a1", "b2", "c3")], features=EVAL_FEATURES
    )
    answers = [Answer(name, name, None, None, "?") for name in ("c3", "a1", "b2")]
    assert score_answers(answers, rows, get_scorer("gqa", EvaluationSettings()), source="-").values == (1.0, 1.0, 1.0)


def test_a_row_that_cannot_be_scored_is_an_error_with_its_id() -> None:
    answers = [Answer(f"GQA-{number}", "A", None, None, "?") for number in range(4)]
    with pytest.raises(ValueError, match="a.jsonl: row 'GQA-0': .*choices"):
        score_answers(answers, make_rows("GQA"), get_scorer("scienceqa", EvaluationSettings()), source="a.jsonl")
