"""Answers and references meet by id, each exactly once; no id stands for two rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.evaluation.joining import score_by_id
from llava_cmoe.evaluation.scorers import Reference, get_scorer
from llava_cmoe.settings.evaluation import EvaluationSettings

GQA = get_scorer("gqa", EvaluationSettings())
ids = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8)


@given(ids, st.randoms())
def test_references_that_share_an_id_are_an_error_with_both_places(found: list[str], random: object) -> None:
    references = [Reference(answer=f"{name} {place}", id=name) for place, name in enumerate(found)]
    answers = [(name, "x") for name in dict.fromkeys(found)]
    random.shuffle(answers)  # type: ignore[attr-defined]
    if len(set(found)) == len(found):
        assert len(score_by_id(answers, references, GQA, "a.jsonl", "mend it").values) == len(found)
    else:
        second = next(place for place, name in enumerate(found) if name in found[:place])
        places = f"rows {found.index(found[second])} and {second} .* same id '{found[second]}'"
        with pytest.raises(ValueError, match=places):
            score_by_id(answers, references, GQA, "a.jsonl", "mend it")


@given(ids, ids)
def test_answers_are_joined_only_if_every_id_is_met_once(asked: list[str], answered: list[str]) -> None:
    references = [Reference(answer=name, id=name) for name in dict.fromkeys(asked)]
    answers = [(name, name) for name in answered]
    if sorted(answered) == sorted(set(asked)):
        assert score_by_id(answers, references, GQA, "a.jsonl", "mend it").accuracy == 1.0
    else:
        with pytest.raises(ValueError, match=r"a\.jsonl: (doubled|unknown|missing) id '.'.*; mend it"):
            score_by_id(answers, references, GQA, "a.jsonl", "mend it")
