"""ScienceQA: which option's letter does the answer name? Only forms that name exactly one letter count.

    A     A.     (A)     A. text     The answer is A     the option's own text

The released scripts fall back to the first lone word character, so "It's B." reads S and "Don't know" reads T, which
is an option in long lists; nothing is guessed here. An option's own text may lack its article or have one more, but a
capital "A" before a text is the letter as well as it is the article: "A dog" names an option that is called "a dog", or
option A that is called "dog", and no other.
"""

from __future__ import annotations

import re
import string

from llava_cmoe.data.demands import letter_of_a_choice
from llava_cmoe.data.spelling import respell
from llava_cmoe.evaluation.scorers.base import Reference, Score
from llava_cmoe.evaluation.scorers.normalise import MARKS, normalise

LETTER_FORMS = tuple(
    re.compile(form, re.DOTALL)
    for form in (
        r"([A-Z])\.?",  # A   A.
        r"\(([A-Z])\)",  # (A)
        r"([A-Z])\.\s+\S.*",  # A. text
        r"[Tt]he answer is ([A-Z])\.?",
    )
)


def score(prediction: str, reference: Reference) -> Score:
    """1 if the prediction names the right option, else 0.

    Raises:
        ValueError: the row has no choices, or its answer is not the letter of one of them.
    """
    letter_of_a_choice(reference)
    return Score(float(extract_letter(prediction, reference.choices) == reference.answer))


def extract_letter(text: str, choices: tuple[str, ...]) -> str | None:
    """The letter that the text names: by itself, or by the full text of exactly one option; None if it names none."""
    letters = string.ascii_uppercase[: len(choices)]
    text = respell(text).strip()
    for form in LETTER_FORMS:
        match = form.fullmatch(text)
        if match and match[1] in letters:
            return match[1]
    given, ambiguous = normalise(text), _first_word(text) == "A"
    named = [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if given and given == normalise(choice)
        if not ambiguous or letter == "A" or _first_word(choice).lower() == "a"
    ]
    return named[0] if len(named) == 1 else None


def _first_word(text: str) -> str:
    return next(iter(respell(text).lstrip(MARKS + string.whitespace).split()), "")
