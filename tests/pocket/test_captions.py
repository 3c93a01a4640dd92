"""What the pocket backbone reads before the tasks holds none of them: no instruction, no answer format."""

import re
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.pocket import world as world
from llava_cmoe.pocket.captions import article, caption, opening, plural, relation, spoken
from llava_cmoe.pocket.drawings import OBJECTS, SHAPES
from llava_cmoe.pocket.tasks import LETTER, LOCATE, SHORT

FLAWS = ("clear", "blurred", "dark", "cut", "unreadable")
INSTRUCTIONS = tuple(text.strip().lower().rstrip(".:") for text in (SHORT, LETTER, LOCATE))
BOX = re.compile(r"\[\s*[01]\.\d")
SEEDS = st.integers(0, 2**32)
DRAWS: tuple[Callable[[Random], object], ...] = (
    world.random_scene,
    lambda rng: world.random_object(rng, FLAWS),
    world.random_sign,
    world.random_book,
)


@pytest.fixture(params=DRAWS, ids=("scene", "object", "sign", "book"))
def captions(request: pytest.FixtureRequest) -> list[str]:
    """Three hundred captions of one kind of view."""
    rngs = [Random(f"captions/{number}") for number in range(300)]
    return [caption(request.param(rng), rng) for rng in rngs]


@pytest.fixture(scope="module")
def spoken_turns() -> list[tuple[str, str]]:
    return [spoken(Random(f"spoken/{number}"), spans=0.2) for number in range(2000)]


def test_a_caption_is_sentences_without_question_instruction_or_box(captions: list[str]):
    for text in captions:
        assert text.endswith(".") and "?" not in text and not BOX.search(text)
        assert not any(instruction in text.lower() for instruction in INSTRUCTIONS)


def test_a_spoken_question_holds_no_instruction_and_no_box(spoken_turns: list[tuple[str, str]]):
    for question, _ in spoken_turns:
        assert question.endswith(("?", ".")) and "<image>" not in question and not BOX.search(question)
        assert not any(instruction in question.lower() for instruction in INSTRUCTIONS)
        assert not re.search(r"\b[A-D]\. \w+\n", question)  # no lettered options


def test_a_spoken_answer_is_a_sentence(spoken_turns: list[tuple[str, str]]):
    for _, answer in spoken_turns:
        assert answer.endswith(".") and len(answer.split()) >= 2 and not BOX.search(answer)


def test_a_spoken_answer_follows_from_the_question(spoken_turns: list[tuple[str, str]]):
    known = {*OBJECTS, *SHAPES, *world.COLOURS, *world.SIGN_WORDS}
    for question, answer in spoken_turns:
        if not question.startswith("what is"):  # of what kind a thing is, is to be known
            assert {word for word in re.findall(r"[a-z]+", answer) if word in known} <= set(
                re.findall(r"[a-z]+", question)
            )


@given(seed=SEEDS)
def test_a_spoken_place_is_the_one_that_was_told(seed: int):
    question, answer = spoken(Random(seed), spans=1.0)
    *told, asked = re.split(r", (?=the)|\. (?=where)", question)
    places = {}
    spans = r"the (\w+ \w+) spans (\S+) to (\S+) across and (\S+) to (\S+) down"
    for name, x0, x1, y0, y1 in re.findall(spans, question):
        places[name] = {"across": (x0, x1), "down": (y0, y1)}
        assert 0 <= float(x0) < float(x1) <= 1 and 0 <= float(y0) < float(y1) <= 1
    assert len(places) == len(told)
    if part := re.fullmatch(r"where does the (.+) (begin|end) (across|down)\?", asked):
        name, end, way = part.groups()
        assert answer == f"it {end}s at {places[name][way][end == 'end']}."
    else:
        assert asked == f"where is the {answer[4 : answer.index(' spans')]}?" and answer[:-1] in told


@given(seed=SEEDS, opened=st.booleans())
def test_a_scene_caption_tells_the_truth(seed: int, opened: bool):
    rng = Random(seed)
    scene = world.random_scene(rng)
    text = caption(scene, rng, opened=float(opened))
    assert text.startswith(opening(scene)) == opened
    kinds = [thing.kind for thing in scene.things]
    by_name = {thing.name: thing for thing in scene.things}
    for one, where, other in re.findall(r"the (\w+ \w+) is (left of|right of|above|below) the (\w+ \w+)\.", text):
        assert relation(by_name[one], by_name[other]) == where
    for name, *box in re.findall(
        r"the (\w+ \w+) spans ([\d.]+) to ([\d.]+) across and ([\d.]+) to ([\d.]+) down\.", text
    ):
        x0, x1, y0, y1 = map(float, box)
        assert by_name[name].box(scene.canvas) == (x0, y0, x1, y1)
    ((count, counted, total),) = re.findall(r"there (?:is|are) (\d) (\w+) among (\d) shapes", text)
    singular = next(kind for kind in SHAPES if counted in (kind, plural(kind)))
    assert int(count) == kinds.count(singular) and int(total) == len(kinds)
    ((present, absent),) = re.findall(r"it has an? (\w+) but no (\w+)\.", text)
    assert present in kinds and absent not in kinds


def thing_at(x: float, y: float) -> world.Thing:
    return world.Thing("circle", "red", x - 5, y - 5, x + 5, y + 5)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ((10, 50), "left of"),
        ((90, 50), "right of"),
        ((50, 10), "above"),
        ((50, 90), "below"),
        ((20, 30), "left of"),  # farther apart sideways
        ((30, 20), "above"),  # farther apart upwards
        ((85, 70), "right of"),
        ((70, 85), "below"),
    ],
)
def test_a_relation_is_told_along_the_longer_distance(at: tuple[float, float], expected: str):
    assert relation(thing_at(*at), thing_at(50, 50)) == expected


@given(
    one=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    other=st.tuples(st.integers(0, 100), st.integers(0, 100)),
)
def test_relations_are_mutual(one: tuple[int, int], other: tuple[int, int]):
    if one == other:
        return
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relation(thing_at(*other), thing_at(*one)) == opposite[relation(thing_at(*one), thing_at(*other))]


def test_articles_and_plurals():
    assert [article(noun) for noun in ("circle", "apple", "umbrella")] == ["a circle", "an apple", "an umbrella"]
    assert [plural(noun) for noun in ("star", "cross", "cactus")] == ["stars", "crosses", "cactuses"]
