"""What LLaVA-CMoE has learned of the tiny sequence, for the tests of its parts."""

from collections.abc import Callable

import pytest
from tiny import Lesson

from llava_cmoe.methods.cmoe import Cmoe


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("cmoe")


@pytest.fixture
def method(lesson: Lesson) -> Cmoe:
    assert isinstance(lesson.run.method, Cmoe)
    return lesson.run.method
