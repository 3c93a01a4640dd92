"""ImageNet: a class name; the released script takes any substring, so that "", "a" or a whole sentence are right."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference

REFERENCE = Reference(answer="Tiger Shark")


@pytest.mark.parametrize(
    "text", ["Tiger Shark", "tiger shark", "a tiger shark.", "Tiger  shark", "\uff34iger\u00a0Shark"]
)
def test_the_class_name_is_right_whatever_its_dress(text: str) -> None:
    assert value("imagenet", text, REFERENCE) == 1.0


@pytest.mark.parametrize("text", ["", "a", "Shark", "Tiger", "The object is a Tiger Shark", "Tiger Sharks"])
def test_parts_and_extensions_of_the_name_are_wrong(text: str) -> None:
    assert value("imagenet", text, REFERENCE) == 0.0
