"""The four steps: joined by id, scored from files alone, aggregated into results that say what was not measured."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor

from llava_cmoe.data.rows import EVAL_FEATURES
from llava_cmoe.data.tasks import TaskSequence, TaskSpec
from llava_cmoe.evaluation import runner
from llava_cmoe.evaluation.generate import Candidate
from llava_cmoe.evaluation.log import Answer, RunFacts, comparable, write_answers
from llava_cmoe.evaluation.runner import (
    Exam,
    aggregate,
    encode_questions,
    evaluate_after,
    forget_answers,
    score_after,
    score_answers,
)
from llava_cmoe.evaluation.scorers import TaskScore, get_scorer
from llava_cmoe.methods.base import Method
from llava_cmoe.records import Located
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.evaluation import EvaluationSettings

SEQUENCE = TaskSequence(
    name="three",
    tasks=tuple(
        TaskSpec(name=name, train="-", evaluate="-", scorer=name.lower(), max_new_tokens=3, version=len(name) % 4)
        for name in ("GQA", "Grounding", "OCRVQA")
    ),
)
FACTS = RunFacts(run="demo", method="cmoe", seed=0, recipe={}, base="b", data="d", seconds={"GQA": {"training": 1.5}})
BOX = [0.0, 0.0, 1.0, 1.0]


def make_rows(name: str, num_rows: int = 4) -> Dataset:
    row: dict[str, Any] = {"image": None, "answers": [], "choices": [], "size": []}
    row["answer"] = str(BOX) if name == "Grounding" else "cat"
    row |= {"box": BOX if name == "Grounding" else [], "turns": [{"role": "user", "text": f"{name}?"}]}
    return Dataset.from_list([{"id": f"{name}-{number}", **row} for number in range(num_rows)], features=EVAL_FEATURES)


@pytest.fixture
def exam(tmp_path: Path) -> Exam:
    rows = {name: make_rows(name) for name in SEQUENCE.names}
    return Exam(SEQUENCE, rows, tmp_path / "answers", EvaluationSettings(routes=("located", "oracle"), batch_size=3), 0)


def write_cell(
    exam: Exam, after: int, task: int, texts: list[str], located: list[int | None], route: Any = "located"
) -> None:
    ids = exam.rows[SEQUENCE.names[task]]["id"]
    answers = [
        Answer(sample_id, text, choice, None, "?") for sample_id, text, choice in zip(ids, texts, located, strict=True)
    ]
    write_answers(exam.answers_path(after, task, route), answers)


@dataclass
class LastTask:
    """Locates every prompt at the task learned last; records whose routers answer."""

    newest: int
    answered_by: list[int] = field(default_factory=list)

    def locate(self, batch: Mapping[str, Tensor]) -> Located:
        num_samples = len(batch["input_ids"])
        return Located(torch.full((num_samples,), self.newest), torch.zeros(num_samples, self.newest + 1))

    @contextmanager
    def routed(self, task_B: Tensor | None) -> Iterator[None]:
        assert task_B is not None
        self.answered_by.extend(task_B.tolist())
        yield

    locating = Method.locating


def test_answers_files_are_laid_out_by_the_task_learned_last(exam: Exam) -> None:
    assert exam.answers_path(2, 1, "oracle") == exam.folder / "after_03" / "Grounding.oracle.jsonl"


def test_a_run_is_asked_every_learned_task_under_every_route_and_only_once(
    exam: Exam, tiny_llava: Any, tiny_processor: Any
) -> None:
    questions = encode_questions(exam, tiny_processor)
    labels: list[tuple[str, int, int]] = []
    for after in range(2):
        candidate = Candidate(LastTask(after), tiny_llava, tiny_processor)
        evaluate_after(exam, questions, candidate, after, PartialState(), lambda *step: labels.append(step))
    cells = score_after(exam, 1)
    assert [(cell.after, cell.task, cell.route, len(cell.scores)) for cell in cells] == [
        (1, 0, "located", 4), (1, 1, "located", 4), (1, 0, "oracle", 4), (1, 1, "oracle", 4),
    ]  # fmt: skip
    assert labels[:4] == [
        ("GQA (located)", 3, 4),
        ("GQA (located)", 4, 4),
        ("GQA (oracle)", 3, 4),
        ("GQA (oracle)", 4, 4),
    ]
    files = sorted(str(path.relative_to(exam.folder)) for path in exam.folder.rglob("*.*"))
    assert files == [
        "after_01/GQA.located.jsonl", "after_01/GQA.oracle.jsonl",
        "after_02/GQA.located.jsonl", "after_02/GQA.oracle.jsonl",
        "after_02/Grounding.located.jsonl", "after_02/Grounding.oracle.jsonl",
    ]  # fmt: skip

    unasked = replace(candidate, model=None)  # any generation would now fail
    evaluate_after(exam, questions, unasked, 1, PartialState())
    assert score_after(exam, 1) == cells
    results = aggregate(exam, FACTS, range(2))
    assert results.locator is not None and results.locator.accuracy == {"GQA": 0.0, "Grounding": 100.0}

    shutil.rmtree(exam.folder / "after_02")  # an evaluation done again gives the same results
    evaluate_after(exam, questions, candidate, 1, PartialState())
    assert comparable(aggregate(exam, FACTS, range(2))) == comparable(results)


def test_oracle_asks_the_true_task_and_random_any_task_learned_so_far(
    exam: Exam, tiny_llava: Any, tiny_processor: Any
) -> None:
    questions = encode_questions(exam, tiny_processor)
    answered_by: dict[str, list[int]] = {}
    for route in ("located", "oracle", "random"):
        method = LastTask(1)
        asked = replace(exam, settings=EvaluationSettings(routes=(route,)))
        evaluate_after(asked, questions, Candidate(method, tiny_llava, tiny_processor), 1, PartialState())
        answered_by[route] = method.answered_by
    assert answered_by["located"] == [1] * 8
    assert answered_by["oracle"] == [0] * 4 + [1] * 4
    assert set(answered_by["random"]) == {0, 1}


def test_a_cell_is_the_mean_score_in_percent_and_grounding_adds_the_mean_overlap(exam: Exam) -> None:
    write_cell(exam, 1, 0, ["cat", "Cat.", "dog", ""], [0] * 4)
    write_cell(exam, 1, 1, ["[0, 0, 1, 1]", "[0, 0, 1, 0.5]", "[0, 0, 1, 0.25]", "none"], [1] * 4)
    gqa, grounding = score_after(exam, 1)
    assert (gqa.accuracy, dict(gqa.detail)) == (50.0, {})
    assert (grounding.accuracy, dict(grounding.detail)) == (
        50.0,
        {"iou": 0.4375, "at_0.3": 0.5, "at_0.5": 0.5, "at_0.7": 0.25, "at_0.9": 0.25},
    )


def test_results_hold_the_matrix_the_metrics_and_the_mean_overlap_per_route(exam: Exam) -> None:
    right, wrong, box = ["cat"] * 4, ["dog"] * 4, ["0 0 1 1"] * 4
    write_cell(exam, 0, 0, right, [0] * 4)
    write_cell(exam, 1, 0, ["cat", "dog", "dog", "dog"], [0, 0, 0, 1])
    write_cell(exam, 1, 1, box, [1, -1, 1, 1])
    write_cell(exam, 1, 0, wrong, [None] * 4, route="oracle")
    results = aggregate(exam, FACTS, range(2))
    assert list(results.routes) == ["located", "oracle"]
    assert results.headline.matrix == ((100.0, None, None), (25.0, 100.0, None))
    assert results.headline.detail["iou"] == ((None, None, None), (None, 1.0, None))
    assert results.headline.metrics["bwt"] == -37.5
    assert results.routes["oracle"].matrix == ((None, None, None), (0.0, None, None))
    assert results.routes["oracle"].metrics["last"] is None
    assert results.num_samples == {"GQA": 4, "Grounding": 4, "OCRVQA": 4}
    assert results.task_versions == {"GQA": 3, "Grounding": 1, "OCRVQA": 2}
    assert results.seconds == {"GQA": {"training": 1.5}}


def test_every_accuracy_and_metric_has_an_interval_around_it(exam: Exam) -> None:
    write_cell(exam, 0, 0, ["cat", "cat", "dog", "dog"], [0] * 4)
    write_cell(exam, 1, 0, ["cat", "dog", "dog", "dog"], [0] * 4)
    write_cell(exam, 1, 1, ["0 0 1 1"] * 4, [1] * 4)
    results = aggregate(exam, FACTS, range(2))
    headline = results.headline
    (first, *_), (second, perfect, unasked) = headline.intervals
    assert first is not None and first[0] < 50 < first[1] and second is not None and second[0] <= 25 < second[1]
    assert perfect == (100.0, 100.0) and unasked is None
    assert {name for name, around in headline.metric_intervals.items() if around is None} == {"transfer"}
    assert results.bootstrap["seed"] == 0


def test_an_accuracy_that_is_no_mean_over_questions_has_no_interval(
    exam: Exam, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cell(exam, 0, 0, ["cat", "cat", "dog", "dog"], [0] * 4)
    write_cell(exam, 1, 1, ["0 0 1 1"] * 4, [1] * 4)
    scorers = {"grounding": lambda texts, references: TaskScore(0.7, (0.9, 0.9, 0.9, 0.0), {})}
    monkeypatch.setattr(runner, "get_scorer", lambda name, settings: scorers.get(name) or get_scorer(name, settings))
    headline = aggregate(exam, FACTS, range(2)).headline
    assert headline.matrix[1][1] == pytest.approx(70) and headline.intervals[1][1] is None
    assert headline.intervals[0][0] is not None
    assert set(headline.metric_intervals.values()) == {None}


def test_answers_of_a_task_that_is_not_learned_yet_are_measured_as_transfer(exam: Exam) -> None:
    for after in range(2):
        for task in range(3):
            write_cell(exam, after, task, ["cat"] * 4, [None] * 4)
    headline = aggregate(exam, FACTS, range(2)).headline
    assert headline.matrix == ((100.0, 0.0, 100.0), (100.0, 0.0, 100.0))
    assert headline.metrics["transfer"] == pytest.approx(200 / 3) and headline.metric_intervals["transfer"] is not None


def test_confusion_counts_the_verdicts_after_the_last_task_with_a_column_for_the_base(exam: Exam) -> None:
    write_cell(exam, 0, 0, ["cat"] * 4, [0] * 4)
    write_cell(exam, 1, 0, ["cat"] * 4, [0, 0, 0, 1])
    write_cell(exam, 1, 1, ["cat"] * 4, [1, -1, 1, -1])
    locator = aggregate(exam, FACTS, range(2)).locator
    assert locator is not None
    assert locator.columns == ("GQA", "Grounding", "base")
    assert locator.confusion == ((3, 1, 0), (0, 2, 2))
    assert locator.accuracy == {"GQA": 75.0, "Grounding": 50.0}
    assert locator.mean_accuracy == 62.5


def test_what_failed_counts_as_wrong_is_told_and_leaves_the_confusion_to_the_others(exam: Exam) -> None:
    ids = exam.rows["GQA"]["id"]
    answers = [Answer(sample_id, "cat", 0, None, "?") for sample_id in ids]
    # A rule by which an empty answer were right would make no difference.
    write_answers(
        exam.answers_path(0, 0, "located"), [*answers[:3], replace(answers[3], located=None, failed="broken")]
    )
    results = aggregate(exam, FACTS, [0])
    assert results.headline.matrix == ((75.0, None, None),)
    assert results.failed == {"after_01/GQA.located": 1}
    assert results.locator is not None and results.locator.confusion == ((3, 0),)


def test_a_method_that_locates_nothing_has_no_confusion(exam: Exam) -> None:
    write_cell(exam, 0, 0, ["cat"] * 4, [None] * 4)
    assert aggregate(exam, FACTS, [0]).locator is None


def test_a_run_measured_only_at_its_end_has_only_a_last_row(exam: Exam) -> None:
    """The joint method learns all tasks at once."""
    for task in range(3):
        write_cell(exam, 2, task, ["cat"] * 4, [None] * 4)
    headline = aggregate(exam, FACTS, [2]).headline
    assert headline.matrix == ((None,) * 3, (None,) * 3, (100.0, 0.0, 100.0))
    assert headline.metrics["last"] == pytest.approx(200 / 3) and headline.metrics["immediate"] is None


def test_a_corrected_answer_changes_the_results_without_a_model(exam: Exam) -> None:
    write_cell(exam, 0, 0, ["dog"] * 4, [0] * 4)
    before = aggregate(exam, FACTS, [0]).headline.matrix
    write_cell(exam, 0, 0, ["cat"] * 4, [0] * 4)
    assert (before, aggregate(exam, FACTS, [0]).headline.matrix) == (((0.0, None, None),), ((100.0, None, None),))


def test_a_run_without_answers_is_refused(exam: Exam) -> None:
    with pytest.raises(ValueError, match="no answers yet"):
        aggregate(exam, FACTS, range(3))


def test_answers_of_a_row_that_the_run_no_longer_holds_do_not_count(exam: Exam) -> None:
    write_cell(exam, 0, 0, ["cat"] * 4, [0] * 4)
    alone = aggregate(exam, FACTS, [0])
    for task in range(2):
        write_cell(exam, 1, task, ["dog"] * 4, [1] * 4)
    assert aggregate(exam, FACTS, [0]) == alone != aggregate(exam, FACTS, [0, 1])


def test_forgetting_a_row_forgets_those_below_it_and_none_above(exam: Exam) -> None:
    for after in range(3):
        write_cell(exam, after, 0, ["cat"] * 4, [0] * 4)
    forget_answers(exam, 1)
    forget_answers(exam, 1)  # nothing there is no error
    assert [path.name for path in exam.folder.iterdir()] == ["after_01"]


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


def test_a_recipe_may_make_the_released_scripts_its_headline(exam: Exam) -> None:
    write_cell(exam, 0, 0, ["the cat"] * 3 + ["cat"], [None] * 4)
    released = replace(exam, settings=exam.settings.model_copy(update={"protocol": "coin"}))
    results = aggregate(released, FACTS, [0])
    assert (results.protocol, results.headline.matrix[0][0]) == ("coin", 25.0)
    assert results.headline.beside["strict"][0][0] == 100.0


def test_the_other_protocol_stands_beside_the_headline_for_the_tasks_that_it_judges(exam: Exam) -> None:
    """CoIN's script takes an article for a mistake, and a box that ends in a digit for another box."""
    captions = SEQUENCE.model_copy(
        update={"tasks": (*SEQUENCE.tasks[:2], SEQUENCE.tasks[2].model_copy(update={"scorer": "vqa_soft"}))}
    )
    rows = dict(exam.rows) | {"OCRVQA": exam.rows["OCRVQA"].map(lambda row: {"answers": ["cat"] * 10})}
    mixed = replace(exam, sequence=captions, rows=rows)
    for after in range(3):
        for task, texts in enumerate((["the cat"] * 3 + ["cat"], ["[0, 0, 1, 1]"] * 3 + ["(0, 0, 1, 1)"], ["cat"] * 4)):
            if task <= after:
                write_cell(mixed, after, task, texts, [None] * 4)
    strict = aggregate(mixed, FACTS, range(3)).headline
    assert strict.matrix[2] == (100.0, 100.0, 100.0)
    assert strict.beside == {"coin": ((25.0, None, None), (25.0, 25.0, None), (25.0, 25.0, None))}


def test_a_task_that_the_headlines_protocol_does_not_judge_is_refused_before_anything_is_learned(exam: Exam) -> None:
    unjudged = SEQUENCE.model_copy(update={"tasks": (SEQUENCE.tasks[0].model_copy(update={"scorer": "numeric"}),)})
    with pytest.raises(RecipeError, match="'numeric' in protocol coin"):
        replace(exam, sequence=unjudged, settings=EvaluationSettings(protocol="coin"))
