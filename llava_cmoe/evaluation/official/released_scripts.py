"""How CoIN's released scripts join answers with official files: protocol `coin` on files; its rules are `scorers/coin`.

What is measured differs from task to task: a missing prediction is wrong in ScienceQA and not noticed elsewhere, a
repeated one counts again except in ScienceQA and GQA, ids are compared as they are or as text, and ImageNet's not at
all. Whatever the scripts stop at is an error here, with one exception: what GQA's reads for its further metrics (words,
type and group of a question) may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llava_cmoe.evaluation.official.files import Annotations, Line, blamed
from llava_cmoe.evaluation.scorers.coin import gqa, grounding, imagenet, ocrvqa, one_answer, scienceqa, textvqa
from llava_cmoe.settings.base import shown

Judged = Iterator[tuple[object, float]]
"""Question id and score, in [0, 1], of everything that the accuracy is a mean over."""

LINE_FIX = "the released script stops here; mend or delete this line"
ROW_FIX = "the released script stops here; take the official file"
PAIR_FIX = "the released script stops here; mend the line, or take the official file"


@dataclass(frozen=True)
class Released:
    """One released script.

    Attributes:
        judge: its scores.
        percent: accuracy from their sum and number, rounded where the script rounds: both ways differ in the last bit.
    """

    judge: Callable[[Annotations, Sequence[Line]], Judged]
    percent: Callable[[float, int], float]


def judge_scienceqa(annotations: Annotations, lines: Sequence[Line]) -> Judged:
    """Over the test split: ids are text, the last of repeated answers stands, those to other questions are ignored."""
    splits, problems = annotations.load("pid_splits.json"), annotations.load("problems.json")
    given = {}
    for line in lines:
        with blamed(line.place, LINE_FIX):
            given[line.answer["question_id"]] = line
    with blamed(str(annotations.folder / "pid_splits.json"), ROW_FIX):
        pids = dict.fromkeys(splits["test"])
    for pid in pids:
        with blamed(f"{annotations.folder / 'problems.json'}, problem {shown(pid)}", ROW_FIX):
            truth, num_choices = problems[pid]["answer"], len(problems[pid]["choices"])
            _ = scienceqa.OPTIONS[truth]  # its letter is looked up, hence has to exist
        read = None
        if found := given.get(pid):
            with blamed(found.place, LINE_FIX):
                read = scienceqa.letter(found.answer["text"], num_choices)
                _ = "<image>" in found.answer["prompt"]  # so is this, for a count that nobody prints
        yield pid, float((scienceqa.OPTIONS.index(read) if read else -1) == truth)


def judge_gqa(annotations: Annotations, lines: Sequence[Line]) -> Judged:
    """Over the distinct questions that are answered, unless marked as not balanced; the last answer stands."""
    questions = annotations.load("testdev_balanced_questions.json")
    predictions = {}
    for line in lines:
        with blamed(line.place, LINE_FIX):
            predictions[line.answer["question_id"]] = line, gqa.prepare(line.answer["text"])
    for question_id, (line, prediction) in predictions.items():
        with blamed(line.place, LINE_FIX):
            question = _entry(questions, question_id, "testdev_balanced_questions.json")
        with blamed(
            f"{annotations.folder / 'testdev_balanced_questions.json'}, question {shown(question_id)}", ROW_FIX
        ):
            right, balanced = prediction == question["answer"], question.get("isBalanced", True)
        if balanced:
            yield question_id, float(right)


def judge_imagenet(annotations: Annotations, lines: Sequence[Line]) -> Judged:
    """Line i against row i; rows that are left over are ignored. A line needs no id, and is named by its place then."""
    name, rows = annotations.rows("ImageNet")
    with blamed(str(annotations.folder / name), ROW_FIX):
        truths = [row["answer"] for row in rows]
    for number, line in enumerate(lines):
        with blamed(line.place, LINE_FIX):
            if number >= len(truths):
                raise ValueError(f"there are more answers than the {len(truths)} rows of {name}")
            right = imagenet.is_right(line.answer["text"], truths[number])
        yield line.answer.get("question_id", number), float(right)


def by_id(
    judge: Callable[[dict[str, Any], dict[str, Any]], float],
    key: Callable[[Any], Any],
    load: Callable[[Annotations], tuple[str, Any]],
) -> Callable[[Annotations, Sequence[Line]], Judged]:
    """Every answer counts, joined with its row by id; an unknown id is an error.

    Args:
        judge: score of an answer, given its row.
        key: the form in which ids are compared.
        load: name and rows of the official file.
    """

    def judged(annotations: Annotations, lines: Sequence[Line]) -> Judged:
        name, entries = load(annotations)
        with blamed(str(annotations.folder / name), ROW_FIX):
            rows = {key(row["question_id"]): row for row in entries}
        for line in lines:
            with blamed(line.place, LINE_FIX):
                question_id = line.answer["question_id"]
                row = _entry(rows, key(question_id), name)
            with blamed(f"{line.place}, question {shown(question_id)} of {name}", PAIR_FIX):
                score = judge(line.answer, row)
            yield question_id, score

    return judged


def _entry(entries: Any, question_id: Any, name: str) -> Any:
    try:
        return entries[question_id]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{name} holds no question {shown(question_id)}") from error


def _textvqa_rows(annotations: Annotations) -> tuple[str, Any]:
    name = "TextVQA_0.5.1_val.json"
    document = annotations.load(name)
    with blamed(str(annotations.folder / name), ROW_FIX):
        return name, document["data"]


def _as_it_is(question_id: Any) -> Any:
    return question_id


def _textvqa(answer: dict[str, Any], row: dict[str, Any]) -> float:
    return textvqa.soft_score(answer["text"], row["answers"])


def _one_answer(answer: dict[str, Any], row: dict[str, Any]) -> float:
    return float(one_answer.is_right(answer["text"], row["answer"]))


def _grounding(answer: dict[str, Any], row: dict[str, Any]) -> float:
    return float(grounding.is_right(answer["text"], row["answer_bbox"], row["size"]))


def _ocrvqa(answer: dict[str, Any], row: dict[str, Any]) -> float:
    return float(ocrvqa.is_right(answer["text"], row["answer"]))


def _mean_first(total: float, number: int) -> float:
    return total / number * 100


def _hundredfold_first(total: float, number: int) -> float:
    return 100 * total / number


RELEASED = {
    "ScienceQA": Released(judge_scienceqa, _mean_first),
    "TextVQA": Released(by_id(_textvqa, str, _textvqa_rows), _mean_first),
    "ImageNet": Released(judge_imagenet, _hundredfold_first),
    "GQA": Released(judge_gqa, _mean_first),
    "VizWiz": Released(by_id(_one_answer, _as_it_is, lambda folder: folder.rows("VizWiz")), _hundredfold_first),
    "Grounding": Released(by_id(_grounding, _as_it_is, lambda folder: folder.rows("Grounding")), _hundredfold_first),
    "VQAv2": Released(by_id(_one_answer, str, lambda folder: folder.rows("VQAv2")), _hundredfold_first),
    "OCRVQA": Released(by_id(_ocrvqa, _as_it_is, lambda folder: folder.rows("OCRVQA")), _hundredfold_first),
}
