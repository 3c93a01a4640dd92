"""Cells of an accuracy matrix, answered by hand: three tasks of four questions each."""

from typing import Any

from datasets import Dataset

from llava_cmoe.data.rows import EVAL_FEATURES
from llava_cmoe.data.tasks import TaskSequence, TaskSpec
from llava_cmoe.evaluation.eval_spec import EvalSpec
from llava_cmoe.evaluation.log import Answer, RunFacts, write_answers

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


def write_cell(
    eval_spec: EvalSpec, after: int, task: int, texts: list[str], located: list[int | None], route: Any = "located"
) -> None:
    ids = eval_spec.rows[SEQUENCE.names[task]]["id"]
    answers = [
        Answer(sample_id, text, choice, None, "?") for sample_id, text, choice in zip(ids, texts, located, strict=True)
    ]
    write_answers(eval_spec.answers_path(after, task, route), answers)
