"""ImageNet as released: either may lie in the other, in the same case."""

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference

REFERENCE = Reference(answer="Tiger Shark")


@pytest.mark.parametrize("text", ["Tiger Shark", "a Tiger Shark.", "Tiger", "k", "r S", " ", ""])
def test_whatever_lies_in_the_name_or_holds_it_is_right(text: str) -> None:
    assert value("imagenet", text, REFERENCE, "coin") == 1.0


@pytest.mark.parametrize("text", ["tiger shark", "TigerShark", "Tiger Shart", "  "])
def test_case_and_blanks_count(text: str) -> None:
    assert value("imagenet", text, REFERENCE, "coin") == 0.0
