"""Scored cells become results that tell every number, how sure it is, and what was not measured."""

from dataclasses import replace

import pytest
from cells import FACTS, SEQUENCE, write_cell

from llava_cmoe.evaluation import scoring
from llava_cmoe.evaluation.aggregate import aggregate
from llava_cmoe.evaluation.eval_spec import EvalSpec
from llava_cmoe.evaluation.log import Answer, write_answers
from llava_cmoe.evaluation.scorers import TaskScore, get_scorer


def test_results_hold_the_matrix_the_metrics_and_the_mean_overlap_per_route(eval_spec: EvalSpec) -> None:
    right, wrong, box = ["cat"] * 4, ["dog"] * 4, ["0 0 1 1"] * 4
    write_cell(eval_spec, 0, 0, right, [0] * 4)
    write_cell(eval_spec, 1, 0, ["cat", "dog", "dog", "dog"], [0, 0, 0, 1])
    write_cell(eval_spec, 1, 1, box, [1, -1, 1, 1])
    write_cell(eval_spec, 1, 0, wrong, [None] * 4, route="oracle")
    results = aggregate(eval_spec, FACTS, range(2))
    assert list(results.routes) == ["located", "oracle"]
    assert results.headline.matrix == ((100.0, None, None), (25.0, 100.0, None))
    assert results.headline.detail["iou"] == ((None, None, None), (None, 1.0, None))
    assert results.headline.metrics["bwt"] == -37.5
    assert results.routes["oracle"].matrix == ((None, None, None), (0.0, None, None))
    assert results.routes["oracle"].metrics["last"] is None
    assert results.num_samples == {"GQA": 4, "Grounding": 4, "OCRVQA": 4}
    assert results.task_versions == {"GQA": 3, "Grounding": 1, "OCRVQA": 2}
    assert results.seconds == {"GQA": {"training": 1.5}}


def test_every_accuracy_and_metric_has_an_interval_around_it(eval_spec: EvalSpec) -> None:
    write_cell(eval_spec, 0, 0, ["cat", "cat", "dog", "dog"], [0] * 4)
    write_cell(eval_spec, 1, 0, ["cat", "dog", "dog", "dog"], [0] * 4)
    write_cell(eval_spec, 1, 1, ["0 0 1 1"] * 4, [1] * 4)
    results = aggregate(eval_spec, FACTS, range(2))
    headline = results.headline
    (first, *_), (second, perfect, unasked) = headline.intervals
    assert first is not None and first[0] < 50 < first[1] and second is not None and second[0] <= 25 < second[1]
    assert perfect == (100.0, 100.0) and unasked is None
    assert {name for name, around in headline.metric_intervals.items() if around is None} == {"transfer"}
    assert results.bootstrap["seed"] == 0


def test_an_accuracy_that_is_no_mean_over_questions_has_no_interval(
    eval_spec: EvalSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cell(eval_spec, 0, 0, ["cat", "cat", "dog", "dog"], [0] * 4)
    write_cell(eval_spec, 1, 1, ["0 0 1 1"] * 4, [1] * 4)
    scorers = {"grounding": lambda texts, references: TaskScore(0.7, (0.9, 0.9, 0.9, 0.0), {})}
    monkeypatch.setattr(scoring, "get_scorer", lambda name, settings: scorers.get(name) or get_scorer(name, settings))
    headline = aggregate(eval_spec, FACTS, range(2)).headline
    assert headline.matrix[1][1] == pytest.approx(70) and headline.intervals[1][1] is None
    assert headline.intervals[0][0] is not None
    assert set(headline.metric_intervals.values()) == {None}


def test_answers_of_a_task_that_is_not_learned_yet_are_measured_as_transfer(eval_spec: EvalSpec) -> None:
    for after in range(2):
        for task in range(3):
            write_cell(eval_spec, after, task, ["cat"] * 4, [None] * 4)
    headline = aggregate(eval_spec, FACTS, range(2)).headline
    assert headline.matrix == ((100.0, 0.0, 100.0), (100.0, 0.0, 100.0))
    assert headline.metrics["transfer"] == pytest.approx(200 / 3) and headline.metric_intervals["transfer"] is not None


def test_confusion_counts_the_verdicts_after_the_last_task_with_a_column_for_the_base(eval_spec: EvalSpec) -> None:
    write_cell(eval_spec, 0, 0, ["cat"] * 4, [0] * 4)
    write_cell(eval_spec, 1, 0, ["cat"] * 4, [0, 0, 0, 1])
    write_cell(eval_spec, 1, 1, ["cat"] * 4, [1, -1, 1, -1])
    locator = aggregate(eval_spec, FACTS, range(2)).locator
    assert locator is not None
    assert locator.columns == ("GQA", "Grounding", "base")
    assert locator.confusion == ((3, 1, 0), (0, 2, 2))
    assert locator.accuracy == {"GQA": 75.0, "Grounding": 50.0}
    assert locator.mean_accuracy == 62.5


def test_what_failed_counts_as_wrong_is_told_and_leaves_the_confusion_to_the_others(eval_spec: EvalSpec) -> None:
    ids = eval_spec.rows["GQA"]["id"]
    answers = [Answer(sample_id, "cat", 0, None, "?") for sample_id in ids]
    # A rule by which an empty answer were right would make no difference.
    write_answers(
        eval_spec.answers_path(0, 0, "located"), [*answers[:3], replace(answers[3], located=None, failed="broken")]
    )
    results = aggregate(eval_spec, FACTS, [0])
    assert results.headline.matrix == ((75.0, None, None),)
    assert results.failed == {"after_01/GQA.located": 1}
    assert results.locator is not None and results.locator.confusion == ((3, 0),)


def test_a_method_that_locates_nothing_has_no_confusion(eval_spec: EvalSpec) -> None:
    write_cell(eval_spec, 0, 0, ["cat"] * 4, [None] * 4)
    assert aggregate(eval_spec, FACTS, [0]).locator is None


def test_a_run_measured_only_at_its_end_has_only_a_last_row(eval_spec: EvalSpec) -> None:
    """The joint method learns all tasks at once."""
    for task in range(3):
        write_cell(eval_spec, 2, task, ["cat"] * 4, [None] * 4)
    headline = aggregate(eval_spec, FACTS, [2]).headline
    assert headline.matrix == ((None,) * 3, (None,) * 3, (100.0, 0.0, 100.0))
    assert headline.metrics["last"] == pytest.approx(200 / 3) and headline.metrics["immediate"] is None


def test_a_corrected_answer_changes_the_results_without_a_model(eval_spec: EvalSpec) -> None:
    write_cell(eval_spec, 0, 0, ["dog"] * 4, [0] * 4)
    before = aggregate(eval_spec, FACTS, [0]).headline.matrix
    write_cell(eval_spec, 0, 0, ["cat"] * 4, [0] * 4)
    assert (before, aggregate(eval_spec, FACTS, [0]).headline.matrix) == (((0.0, None, None),), ((100.0, None, None),))


def test_a_run_without_answers_is_refused(eval_spec: EvalSpec) -> None:
    with pytest.raises(ValueError, match="no answers yet"):
        aggregate(eval_spec, FACTS, range(3))


def test_answers_of_a_row_that_the_run_no_longer_holds_do_not_count(eval_spec: EvalSpec) -> None:
    write_cell(eval_spec, 0, 0, ["cat"] * 4, [0] * 4)
    alone = aggregate(eval_spec, FACTS, [0])
    for task in range(2):
        write_cell(eval_spec, 1, task, ["dog"] * 4, [1] * 4)
    assert aggregate(eval_spec, FACTS, [0]) == alone != aggregate(eval_spec, FACTS, [0, 1])


def test_a_recipe_may_make_the_released_scripts_its_headline(eval_spec: EvalSpec) -> None:
    write_cell(eval_spec, 0, 0, ["the cat"] * 3 + ["cat"], [None] * 4)
    released = replace(eval_spec, settings=eval_spec.settings.model_copy(update={"protocol": "coin"}))
    results = aggregate(released, FACTS, [0])
    assert (results.protocol, results.headline.matrix[0][0]) == ("coin", 25.0)
    assert results.headline.other_protocols["strict"][0][0] == 100.0


def test_the_other_protocol_stands_beside_the_headline_for_the_tasks_that_it_judges(eval_spec: EvalSpec) -> None:
    """CoIN's script takes an article for a mistake, and a box that ends in a digit for another box."""
    captions = SEQUENCE.model_copy(
        update={"tasks": (*SEQUENCE.tasks[:2], SEQUENCE.tasks[2].model_copy(update={"scorer": "vqa_soft"}))}
    )
    rows = dict(eval_spec.rows) | {"OCRVQA": eval_spec.rows["OCRVQA"].map(lambda row: {"answers": ["cat"] * 10})}
    mixed = replace(eval_spec, sequence=captions, rows=rows)
    for after in range(3):
        for task, texts in enumerate((["the cat"] * 3 + ["cat"], ["[0, 0, 1, 1]"] * 3 + ["(0, 0, 1, 1)"], ["cat"] * 4)):
            if task <= after:
                write_cell(mixed, after, task, texts, [None] * 4)
    strict = aggregate(mixed, FACTS, range(3)).headline
    assert strict.matrix[2] == (100.0, 100.0, 100.0)
    assert strict.other_protocols == {"coin": ((25.0, None, None), (25.0, 25.0, None), (25.0, 25.0, None))}
