"""The table of scorers: every name answers, stays within [0, 1], and calls an empty answer wrong."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_cmoe.evaluation.scorers import SCORERS, Reference, get_scorer

# A busy machine is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FULL = Reference(answer="A", choices=("red", "blue"), answers=("A",) * 10, box=(0.1, 0.2, 0.5, 0.9))


@pytest.mark.parametrize("name", SCORERS)
@UNHURRIED
@given(text=st.text(max_size=30))
def test_every_score_lies_within_zero_and_one(name: str, text: str) -> None:
    assert 0.0 <= SCORERS[name](text, FULL).value <= 1.0


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("empty", ["", " ", "\n\t"])
def test_an_empty_answer_is_wrong_in_every_task(name: str, empty: str) -> None:
    assert SCORERS[name](empty, FULL).value == 0.0


def test_an_unknown_scorer_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match="'scienecqa'.*scienceqa"):
        get_scorer("scienecqa")


def test_a_reference_is_read_from_a_canonical_row() -> None:
    row = {"id": "7", "answer": "A", "answers": ["x"] * 10, "box": [0.0, 0.5, 1.0, 1.0], "choices": ["l", "r"]}
    assert Reference.from_row(row) == Reference("A", ("x",) * 10, (0.0, 0.5, 1.0, 1.0), ("l", "r"))
