"""What scoring demands is asked when rows are read: whatever is let through, no scorer of any protocol refuses."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judging import judge

from llava_cmoe.data.check import check_sequence
from llava_cmoe.data.coin import read_eval
from llava_cmoe.data.demands import DEMANDS
from llava_cmoe.data.problems import DataError, Unusable
from llava_cmoe.data.tasks import TaskSequence, TaskSpec
from llava_cmoe.evaluation.scorers import PROTOCOLS, Reference

Edit = Callable[[str, Callable[[list[dict[str, Any]]], object]], Path]

JUDGED_HERE = {(protocol, name) for protocol, rules in PROTOCOLS.items() for name in rules.scorers} - {
    ("strict", "captions"),  # a Java program
    ("strict", "llm_judge"),  # a server
}
texts = st.text("aAbB1.5 -\u200b", max_size=6)
references = st.builds(
    Reference,
    answer=st.one_of(texts, st.sampled_from([*string.ascii_uppercase, "b", "[0, 0, 1, 1]", "-3 million"])),
    answers=st.one_of(
        st.just(()), st.lists(texts, min_size=8, max_size=11).map(tuple), st.lists(texts, max_size=4).map(tuple)
    ),
    box=st.one_of(st.just(()), st.lists(st.floats(0, 1), min_size=2, max_size=5).map(tuple)),
    choices=st.one_of(st.just(()), st.lists(texts, max_size=30).map(tuple)),
    id=st.just("7"),
)


def refused(name: str, reference: Reference) -> str | None:
    try:
        DEMANDS[name](reference)
    except Unusable as error:
        return str(error)
    return None


def test_every_scorer_states_what_it_demands() -> None:
    assert set(DEMANDS) == {name for rules in PROTOCOLS.values() for name in rules.scorers}


@pytest.mark.parametrize(("protocol", "name"), sorted(JUDGED_HERE))
@given(reference=references, text=texts)
def test_what_is_let_through_is_judged(protocol: str, name: str, reference: Reference, text: str) -> None:
    if refused(name, reference) is None and (protocol, name) != ("coin", "grounding"):  # reading checks the box's text
        assert 0.0 <= judge(name, text, reference, protocol).accuracy <= 1.0


@pytest.mark.parametrize("name", ["scienceqa", "textvqa", "grounding"])
@given(reference=references)
def test_what_strict_refuses_is_refused_before(name: str, reference: Reference) -> None:
    try:
        judge(name, "A", reference)
    except ValueError as error:
        assert refused(name, reference) in str(error)


@pytest.mark.parametrize(
    ("name", "reference", "why"),
    [
        (
            "scienceqa",
            Reference(answer="b", choices=("cat", "dog")),
            r"'b' to .* is not the letter of one of the 2 .*\(A, B\)",
        ),
        ("scienceqa", Reference(answer="A"), "no choices: set the task's annotations"),
        ("textvqa", Reference(answers=("a",) * 9), "9 annotators' answers"),
        ("vizwiz", Reference(answer="a", answers=("a",) * 3), "3 annotators' answers.* or take scorer vqa_soft"),
        ("vqa_soft", Reference(answers=("\u200b", " ")), "no answer that shows anything"),
        ("captions", Reference(answers=("a dog", " ")), "an empty caption: check the task's annotations"),
        ("grounding", Reference(box=(0, 1)), "2 numbers, 4 are needed: check answer_bbox"),
    ],
)
def test_a_refusal_says_what_to_mend(name: str, reference: Reference, why: str) -> None:
    with pytest.raises(Unusable, match=why):
        DEMANDS[name](reference)


@given(st.integers(1, 30))
def test_vqa_soft_takes_any_number_of_answers(number: int) -> None:
    assert refused("vqa_soft", Reference(answers=("soup",) * number)) is None
    assert refused("vqa_soft", Reference(answer="soup")) is None


@pytest.fixture
def two_wrong_letters(root: Path, sequence: TaskSequence, edit: Edit) -> Path:
    """ScienceQA with an answer of "b" in rows 2 and 5; its annotations say that all have two choices."""
    rows = [{"question_id": str(number), "text": "?", "answer": "AB"[number % 2]} for number in range(6)]
    rows[2]["answer"] = rows[5]["answer"] = "b"
    problems = {str(number): {"choices": ["cat", "dog"]} for number in range(6)}
    (root / "cl_dataset/ScienceQA/problems.json").write_text(json.dumps(problems))
    return edit("ScienceQA/test.json", lambda found: found.__setitem__(slice(None), rows))


def test_rows_that_scoring_would_refuse_are_problems_of_the_check(
    root: Path, sequence: TaskSequence, two_wrong_letters: Path
) -> None:
    problems = check_sequence(root, sequence).problems
    assert [(problem.file, problem.row, problem.row_id) for problem in problems] == [
        (two_wrong_letters, 2, "2"),
        (two_wrong_letters, 5, "5"),
    ]
    assert all("correct the row's answer" in problem.reason for problem in problems)


def test_reading_for_training_stops_at_the_first_of_them(
    root: Path, sequence: TaskSequence, two_wrong_letters: Path
) -> None:
    with pytest.raises(
        DataError, match=r"test\.json, row 2 \(id 2\): the answer 'b' to question '2' is not the letter"
    ):
        read_eval(root, sequence.tasks[0])


def test_a_task_of_choices_without_annotations_is_refused_with_the_key_to_set(
    root: Path, sequence: TaskSequence
) -> None:
    task = sequence.tasks[0].model_copy(update={"annotations": None})
    with pytest.raises(DataError, match=r"row 0 \(id 3\): the row has no choices: set the task's annotations"):
        read_eval(root, task)


def test_choices_and_answers_may_stand_in_the_rows(root: Path, sequence: TaskSequence, edit: Edit) -> None:
    edit("ScienceQA/test.json", lambda rows: [row.update(choices=["up", "down", 3]) for row in rows])
    task = sequence.tasks[0].model_copy(update={"annotations": None})
    assert read_eval(root, task)["choices"] == [["up", "down", "3"]] * 2
    vqa = [{"answer": "go", "answer_confidence": "yes"}] * 9 + [{"answer": "goo", "answer_confidence": "no"}]
    edit("TextVQA/val.json", lambda rows: rows[0].update(answers=vqa))
    for scorer in ("vizwiz", "vqa_soft"):
        spec = TaskSpec.model_validate(sequence.tasks[1].model_dump() | {"scorer": scorer, "annotations": None})
        row = read_eval(root, spec)[0]
        assert (row["answer"], row["answers"]) == ("go", ["go"] * 9 + ["goo"])


NO_LISTS = ["up, down", {"A": "up", "B": "down"}, 5, True, [["up"]], [None], [True], [{"text": "up"}]]


@pytest.mark.parametrize("value", NO_LISTS)
@pytest.mark.parametrize("where", ["annotations", "row"])
@pytest.mark.parametrize("task", [0, 1])
def test_what_is_no_list_of_texts_is_refused_by_name_and_never_read_by_letters(
    root: Path, sequence: TaskSequence, edit: Edit, value: object, where: str, task: int
) -> None:
    name, file = ("choices", "ScienceQA/problems.json") if task == 0 else ("answers", "TextVQA/answers.json")
    spec = sequence.tasks[task]
    if where == "row":
        edit(spec.evaluate[0], lambda rows: rows[0].update({name: value}))
        spec = spec.model_copy(update={"annotations": None})
    else:
        entry = {"question_id": 11, name: value}
        document = {"3": entry, "4": entry} if task == 0 else {"data": [entry]}
        (root / "cl_dataset" / file).write_text(json.dumps(document))
    with pytest.raises(DataError, match=rf"`{name}` (is one text|must be a list of texts)") as error:
        read_eval(root, spec)
    assert ("row 0" if where == "row" else file) in str(error.value)
    assert ("problem '3'" if task == 0 else "question '11'") in str(error.value) or where == "row"
