"""A part of the evaluation questions, drawn so that it looks like the whole: stratified, seeded, without replacement.

Rows offer two things to stratify by: how the question begins (its first two words, the type of a question in the VQA
evaluation) and the reference answer. Rows are ordered by both, at random among equals, and every n-th is taken from a
random start (systematic sampling): each kind of question, and each answer within it, gets its share to within one row.
"""

from __future__ import annotations

from random import Random

from datasets import Dataset

from llava_cmoe.data.rows import MARKER

UNSTRATIFIED = "nothing: drawn at random"
STRATA = "the question's first two words, then the reference answer"


def stratified(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows, in the order of the rows; all where none is asked for or fewer exist."""
    if limit is None or limit >= len(rows):
        return rows
    random = Random(seed)
    places = [random.random() for _ in range(len(rows))]
    questions = (turns[0]["text"] for turns in rows["turns"][:])
    strata = [stratum(question, answer) for question, answer in zip(questions, rows["answer"][:], strict=True)]
    ordered = sorted(range(len(rows)), key=lambda index: (*strata[index], places[index]))
    start = random.random()
    taken = [ordered[int((number + start) * len(rows) / limit)] for number in range(limit)]
    return rows.select(sorted(taken))


def stratum(question: str, answer: str) -> tuple[str, str]:
    """What kind of question it is, and the answer it wants."""
    words = question.replace(MARKER, " ").casefold().split()
    return " ".join(words[:2]), answer
