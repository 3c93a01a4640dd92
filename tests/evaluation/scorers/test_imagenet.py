"""ImageNet: a class name; the released script takes any substring, so that "", "a" or a whole sentence are right."""

import pytest

from llava_cmoe.evaluation.scorers import Reference, get_scorer

REFERENCE = Reference(answer="Tiger Shark")


@pytest.mark.parametrize("text", ["Tiger Shark", "tiger shark", "a tiger shark.", "Tiger  shark"])
def test_the_class_name_is_right_whatever_its_dress(text: str) -> None:
    assert get_scorer("imagenet")(text, REFERENCE).value == 1.0


@pytest.mark.parametrize("text", ["", "a", "Shark", "Tiger", "The object is a Tiger Shark", "Tiger Sharks"])
def test_parts_and_extensions_of_the_name_are_wrong(text: str) -> None:
    assert get_scorer("imagenet")(text, REFERENCE).value == 0.0
