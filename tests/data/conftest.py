"""A small sound data root in CoIN's layout; tests of the data room break it in one place each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_cmoe.data.tasks import TaskSequence, TaskSpec

PNG = "ScienceQA/images/train/1/image.png"
JPG = "COCO2014/train2014/000000000001.jpg"
OTHER = "COCO2014/val2014/000000000002.jpg"

FILES: dict[str, list[dict[str, Any]]] = {
    "ScienceQA/train.json": [
        {
            "id": "1",
            "image": PNG,
            "conversations": [
                {"from": "human", "value": "Which one?\nA. up\nB. down\n<image>"},
                {"from": "gpt", "value": "A"},
            ],
        },
        {
            "id": "2",
            "conversations": [{"from": "human", "value": "Is ice cold?\nA. yes\nB. no"}, {"from": "gpt", "value": "A"}],
        },
    ],
    "ScienceQA/test.json": [
        {"question_id": "3", "image": f"./{PNG}", "text": "Which other?\nA. up\nB. down\nC. left", "answer": "C"},
        {"question_id": "4", "text": "Is fire cold?\nA. yes\nB. no", "answer": "B"},
    ],
    "TextVQA/train.json": [
        {
            "question_id": 7,
            "image": f"cl_dataset/{JPG}",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat does it say?"},
                {"from": "gpt", "value": "stop"},
                {"from": "human", "value": "Which colour?"},
                {"from": "gpt", "value": "red"},
            ],
        },
    ],
    "TextVQA/val.json": [{"question_id": 11, "image": OTHER, "text": "What does it say?", "answer": "go"}],
    "Grounding/train.json": [
        {
            "id": 1,
            "image": JPG,
            "conversations": [
                {"from": "human", "value": "<image>\nWhere?"},
                {"from": "gpt", "value": "[0.1, 0, 1, 1]"},
            ],
        },
    ],
    "Grounding/test.json": [
        {"question_id": 1, "image": OTHER, "text": "Where?", "answer_bbox": "[0.12, 0.5, 0.75, 1.0]", "size": [30, 20]}
    ],
}


def _spec(name: str, folder: str, split: str, annotations: str | None = None) -> TaskSpec:
    return TaskSpec(
        name=name,
        train=f"{folder}/train.json",
        evaluate=f"{folder}/{split}.json",
        scorer=name,
        max_new_tokens=4,
        annotations=annotations,
    )


@pytest.fixture
def sequence() -> TaskSequence:
    return TaskSequence(
        name="three",
        tasks=(
            _spec("scienceqa", "ScienceQA", "test", "cl_dataset/ScienceQA/problems.json"),
            _spec("textvqa", "TextVQA", "val", "cl_dataset/TextVQA/answers.json"),
            _spec("grounding", "Grounding", "test"),
        ),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "coin"
    for name, rows in FILES.items():
        file = root / "Instructions_Original" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
    for name, size in ((PNG, (20, 30)), (JPG, (30, 20)), (OTHER, (30, 20))):
        picture = root / "cl_dataset" / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 30, 30)).save(picture)
    problems = {"3": {"choices": ["up", "down", "left"]}, "4": {"choices": ["yes", "no"]}}
    (root / "cl_dataset/ScienceQA/problems.json").write_text(json.dumps(problems))
    answers = {"data": [{"question_id": 11, "answers": ["go"] * 9 + ["goo"]}]}
    (root / "cl_dataset/TextVQA").mkdir()
    (root / "cl_dataset/TextVQA/answers.json").write_text(json.dumps(answers))
    return root


@pytest.fixture
def edit(root: Path) -> Callable[[str, Callable[[list[dict[str, Any]]], object]], Path]:
    """Change one instruction file of `root` in place: `edit("GQA/train.json", lambda rows: rows.clear())`."""

    def change(name: str, mutate: Callable[[list[dict[str, Any]]], object]) -> Path:
        file = root / "Instructions_Original" / name
        rows = json.loads(file.read_text())
        mutate(rows)
        file.write_text(json.dumps(rows))
        return file

    return change
