"""Joins answers with references by id, each exactly once: protocol `strict`, and every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from llava_cmoe.evaluation.log import LogError
from llava_cmoe.evaluation.scorers.base import Reference, Scorer, TaskScore
from llava_cmoe.settings.base import shown


def score_by_id(
    answers: Sequence[tuple[str, str]], references: Iterable[Reference], scorer: Scorer, source: str, fix: str
) -> TaskScore:
    """Scores in the references' order.

    Args:
        answers: pairs of a question's id and the text that answers it.
        references: at least one.
        scorer: judges the task.
        source: names the answers in errors.
        fix: says in errors what to do about the ids.

    Raises:
        ValueError: an id is missing, doubled or unknown, two references share one, or a row cannot be scored.
    """
    known = _by_id(references)
    ids = [question_id for question_id, _ in answers]
    doubled = [question_id for question_id, count in Counter(ids).items() if count > 1]
    unknown = sorted(set(ids).difference(known))
    missing = sorted(known.keys() - set(ids))
    for problem, found in (("doubled", doubled), ("unknown", unknown), ("missing", missing)):
        if found:
            raise LogError(f"{source}: {problem} id {shown(found[0])} ({len(found)} in all); {fix}")
    texts = dict(answers)
    try:
        return scorer([texts[question_id] for question_id in known], list(known.values()))
    except ValueError as error:
        raise LogError(f"{source}: {error}") from error


def _by_id(references: Iterable[Reference]) -> dict[str, Reference]:
    known: dict[str, Reference] = {}
    for place, reference in enumerate(references):
        if known.setdefault(reference.id, reference) is not reference:
            first = list(known).index(reference.id)
            raise LogError(f"rows {first} and {place} that are scored have the same id {shown(reference.id)}; keep one")
    return known
