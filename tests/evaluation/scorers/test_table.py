"""The table of scorers: every name answers, stays within [0, 1], and in `strict` calls an empty answer wrong."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judging import judge, value

from llava_cmoe.evaluation.scorers import PROTOCOLS, Reference, Score, get_scorer
from llava_cmoe.evaluation.scorers.base import each
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.evaluation import EvaluationSettings

# A busy machine is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FULL = Reference(answer="A", choices=("red", "blue"), answers=("A",) * 10, box=(0.1, 0.2, 0.5, 0.9))
BOXED = Reference(answer="[0.1, 0.2, 0.5, 0.9]", box=(0.1, 0.2, 0.5, 0.9), size=(640, 480))
COIN = tuple(PROTOCOLS["coin"].scorers)
SCORERS = [(protocol, name) for protocol in PROTOCOLS for name in COIN]


def reference_of(name: str) -> Reference:
    return BOXED if name == "grounding" else FULL


@pytest.mark.parametrize(("protocol", "name"), SCORERS)
@UNHURRIED
@given(text=st.text(max_size=30))
def test_every_score_lies_within_zero_and_one(protocol: str, name: str, text: str) -> None:
    assert 0.0 <= value(name, text, reference_of(name), protocol) <= 1.0


@pytest.mark.parametrize("name", COIN)
@pytest.mark.parametrize("empty", ["", " ", "\n\t"])
def test_an_empty_answer_is_wrong_in_every_task_where_it_should_be(name: str, empty: str) -> None:
    assert value(name, empty, reference_of(name), "strict") == 0.0


def test_every_task_of_coin_is_judged_in_both_protocols() -> None:
    assert set(COIN) == {"scienceqa", "textvqa", "imagenet", "gqa", "vizwiz", "grounding", "vqav2", "ocrvqa"}
    assert set(COIN) <= set(PROTOCOLS["strict"].scorers)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_unknown_scorer_is_refused_with_the_known_names(protocol: str) -> None:
    with pytest.raises(RecipeError, match=f"'scienecqa' in protocol {protocol}.*scienceqa"):
        get_scorer("scienecqa", EvaluationSettings.model_validate({"protocol": protocol}))


def test_a_task_is_the_mean_of_its_answers_and_of_their_details() -> None:
    def rule(text: str, reference: Reference) -> Score:
        return Score(float(text == reference.answer), {"length": float(len(text))})

    score = each(rule)(EvaluationSettings())(["a", "bcd"], [Reference("a"), Reference("b")])
    assert (score.accuracy, score.values, score.detail) == (0.5, (1.0, 0.0), {"length": 2.0})


def test_a_row_that_cannot_be_scored_is_named() -> None:
    with pytest.raises(ValueError, match="row 'seven': .*choices"):
        judge("scienceqa", "A", Reference(answer="A", id="seven"))


def test_a_reference_is_read_from_a_canonical_row() -> None:
    row = {"id": "7", "answer": "A", "answers": ["x"] * 10, "box": [0.0, 0.5, 1.0, 1.0], "choices": ["l", "r"]}
    row |= {"size": [640, 480], "turns": [{"role": "user", "text": "Which?"}]}
    assert Reference.from_row(row) == Reference(
        "A", ("x",) * 10, (0.0, 0.5, 1.0, 1.0), ("l", "r"), (640, 480), "7", "Which?"
    )
