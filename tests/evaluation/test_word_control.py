"""What the words of a prompt alone tell of its task: the control of every locator."""

import math
from random import Random

import pytest

from llava_cmoe.evaluation.word_control import LARGEST, word_control, words_of

WORDS = "what how is there many colour says left".split()


def questions(rng: Random, words: list[str], num: int = 40) -> list[str]:
    return ["<image>\n" + " ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(num)]


@pytest.mark.parametrize("seed", range(5))
def test_it_is_bayes_rule_with_counts_smoothed_by_one(seed: int):
    rng = Random(seed)
    learned = {name: questions(rng, rng.sample(WORDS, 5)) for name in "abc"}
    asked = {name: questions(rng, [*WORDS, "unheard"]) for name in "abc"}
    known = {word for texts in learned.values() for text in texts for word in words_of(text)}

    def score(task: str, text: str) -> float:
        told = [word for one in learned[task] for word in words_of(one)]
        share = {word: (told.count(word) + 1) / (len(told) + len(known)) for word in known}
        return sum(math.log(share[word]) for word in words_of(text) if word in known)

    for task, percent in word_control(learned, asked).items():
        right = sum(max("abc", key=lambda name, text=text: score(name, text)) == task for text in asked[task])
        assert percent == pytest.approx(100 * right / len(asked[task]))


def test_tasks_with_words_of_their_own_are_all_named_and_the_same_questions_never_more_than_once():
    apart = {"a": ["what is it"], "b": ["how many are there"]}
    assert word_control(apart, apart) == {"a": 100, "b": 100}
    alike = {"a": ["what is it"] * 3, "b": ["what is it"] * 3}
    assert sum(word_control(alike, alike).values()) == 100


def test_the_picture_has_no_word_and_only_so_many_questions_are_counted():
    assert words_of("<image>\nWhat is IT?") == ["what", "is", "it", "?"]
    learned = {"a": ["red"] * LARGEST + ["blue"] * LARGEST, "b": ["blue", *["green"] * LARGEST]}
    assert word_control(learned, {"a": ["blue"], "b": ["blue"]}) == {"a": 0, "b": 100}
