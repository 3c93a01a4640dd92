"""Captions are judged as one task by MS COCO's metrics; what these need is told before anything is learned."""

import shutil

import pytest

from llava_cmoe.evaluation.scorers import Reference, TaskScore, captions, get_scorer
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.evaluation import EvaluationSettings

REFERENCES = [
    Reference(id="1", answers=("a dog runs on the beach", "a brown dog is running by the sea")),
    Reference(id="2", answers=("two people ride bicycles", "a couple on bikes")),
    Reference(id="3", answer="a red bus stands at the stop"),
]
TEXTS = ["A brown dog\u2028is running\r\nby the sea.", "people ||| ride\x85bikes \ud800", " \n"]
"""Right, half right and nothing, with what would shift all that follows in the Java programs: line separators of
Unicode and the sign between METEOR's fields."""


@pytest.fixture(scope="module")
def judged() -> TaskScore:
    """Once: loading METEOR takes most of the time."""
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("no Java runtime")
    return get_scorer("captions", EvaluationSettings())(TEXTS, REFERENCES)


def test_what_is_missing_is_told_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install pycocoevalcap"):
        get_scorer("captions", EvaluationSettings())
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RecipeError, match=r"no `java` on the PATH.*install a Java runtime"):
        get_scorer("captions", EvaluationSettings())


def test_a_row_without_a_caption_is_an_error_with_its_id() -> None:
    with pytest.raises(ValueError, match="row '7': an empty caption.*annotations"):
        captions._captions(Reference(id="7"))


def test_a_task_is_the_mean_of_the_seven_metrics_over_all_its_answers(judged: TaskScore) -> None:
    names = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider"]
    assert list(judged.detail) == names
    assert judged.accuracy == pytest.approx(sum(judged.detail.values()) / 7)
    assert all(0 < value < 1 for name, value in judged.detail.items() if name != "cider")
    assert judged.accuracy != pytest.approx(sum(judged.values) / 3)  # BLEU of a task is no mean over its captions


def test_a_caption_is_worth_more_the_nearer_it_is_whatever_signs_it_holds(judged: TaskScore) -> None:
    right, half, nothing = judged.values
    assert right > 1 > half > 0.1 and nothing == pytest.approx(0, abs=1e-6)
