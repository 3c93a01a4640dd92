"""The validation split: held out from learning, the same for every seed, and judged by the task's own scorer."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny
from datasets import Dataset

from llava_cmoe.data.problems import DataError
from llava_cmoe.data.rows import EVAL_FEATURES, TRAIN_FEATURES
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.data.validation import as_questions, options_of, split
from llava_cmoe.settings.data import DataSettings

FILE = Path("train.json")


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return {"id": "1", "image": None, "turns": turns, **more}


def dataset(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(rows, features=TRAIN_FEATURES)


@pytest.mark.parametrize("num", [1, 2, 9, 10, 25, 200])
def test_a_tenth_is_asked_and_the_rest_learned_each_in_its_order(num: int):
    rows = dataset([row(f"q{number}", "a") | {"id": str(number)} for number in range(num)])
    learned, asked = split(rows)
    numbers = [int(one) for one in learned["id"]], [int(one) for one in asked["id"]]
    assert sorted([*numbers[0], *numbers[1]]) == list(range(num))
    assert all(part == sorted(part) for part in numbers)
    assert len(asked) == min(num - 1, max(1, round(num / 10)))
    assert split(rows)[1]["id"][:] == asked["id"][:]


def test_no_seed_of_a_run_learns_what_is_asked_and_all_are_asked_the_same(tiny_data: Path):
    settings = DataSettings(sequence=str(tiny_data / "sequence.yaml"), root=tiny_data, train_rows=5)
    asked = []
    for seed in range(4):
        data = TaskData.open(settings, seed, "validation")
        for task in data.sequence.tasks:
            texts = {turns[0]["text"] + str(image) for turns, image in pairs(data.evaluate[task.name])}
            for learned in (data.train[task.name], data.held_out(task.name)):
                assert not texts & {turns[0]["text"] + str(image) for turns, image in pairs(learned)}
        asked.append({name: rows[:] for name, rows in data.evaluate.items()})
    assert all(one == asked[0] for one in asked)


def pairs(rows: Dataset) -> list[tuple[Any, Any]]:
    return list(zip(rows["turns"][:], rows["image"][:], strict=True))


def test_the_test_split_learns_all_rows_as_before(tiny_data: Path):
    settings = DataSettings(sequence=str(tiny_data / "sequence.yaml"), root=tiny_data)
    data = TaskData.open(settings, 0)
    assert all(len(rows) == tiny.NUM_TRAIN for rows in data.train.values())
    assert all(len(rows) == tiny.NUM_EVAL for rows in data.evaluate.values())


@pytest.mark.parametrize("letters", [2, 3, 4, 5])
@pytest.mark.parametrize("form", ["{}. {}", "({}) {}", "{}) {}"])
def test_the_options_of_a_question_are_its_choices(letters: int, form: str):
    rng = Random(letters)
    options = [rng.choice(("moss", "a red fern", "12.5 g", "B. Frost")) + str(place) for place in range(letters)]
    lines = [form.format("ABCDE"[place], option) for place, option in enumerate(options)]
    question = "\n".join(["Context: A. a hint", "Which one?", *lines, "Answer with the option's letter."])
    assert options_of(question) == options or question.startswith("Context")
    (asked,) = as_questions(dataset([row(question, "B")]), "scienceqa", FILE)
    assert asked["choices"] == options and asked["answer"] == "B"


@pytest.mark.parametrize(
    ("scorer", "answer", "field", "wanted"),
    [
        ("grounding", "[0.10, 0.20, 0.30, 0.40]", "box", [0.1, 0.2, 0.3, 0.4]),
        ("textvqa", "stop", "answers", ["stop"] * 10),
        ("vqav2", " 2 ", "answer", "2"),
    ],
)
def test_what_evaluation_files_have_beside_a_question_is_made_from_the_row(
    scorer: str, answer: str, field: str, wanted: object
):
    questions = as_questions(dataset([row("?", answer), row("?", answer)]), scorer, FILE)
    assert questions.features == EVAL_FEATURES and len(set(questions["id"])) == 2
    assert all(one[field] == wanted for one in questions)


@pytest.mark.parametrize(("scorer", "answer"), [("grounding", "left"), ("scienceqa", "B"), ("scienceqa", "moss")])
def test_a_row_that_its_scorer_could_not_judge_is_named(scorer: str, answer: str):
    with pytest.raises(DataError, match=r"train.json .id 1.: cannot be asked in the validation split: "):
        as_questions(dataset([row("Which one?", answer)]), scorer, FILE)
