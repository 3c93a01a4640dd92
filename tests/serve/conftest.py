from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from serving import SMALL, Running, serving
from tiny import Lesson

from llava_cmoe.chat.opening import LearnedRun, open_learned


@pytest.fixture(scope="session")
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("cmoe")


@pytest.fixture(scope="session")
def learned(lesson: Lesson) -> LearnedRun:
    return open_learned(lesson.recipe.run)


@pytest.fixture(scope="module")
def running(learned: LearnedRun, lesson: Lesson) -> Iterator[Running]:
    with serving(learned) as running:
        yield running


@pytest.fixture
def held(learned: LearnedRun, lesson: Lesson) -> Iterator[Running]:
    """A server that answers nothing until it is let: one at a time, one more may wait."""
    with serving(learned, replace(SMALL, batch=1, queue=1), held=True) as running:
        yield running
