"""ScienceQA: which option's letter does the answer name? Only forms that name exactly one letter count.

The released scripts fall back to the first lone word character, so "It's B." reads S and "Don't know" reads T, which
is an option in long lists; nothing is guessed here.
"""

from __future__ import annotations

import re
import string

from llava_cmoe.evaluation.scorers.base import Reference, Score
from llava_cmoe.evaluation.scorers.normalise import normalise

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
    letters = string.ascii_uppercase[: len(reference.choices)]
    if len(reference.answer) != 1 or reference.answer not in letters:
        raise ValueError(
            f"the answer {reference.answer!r} is not the letter of one of the {len(reference.choices)} choices: "
            "check the row's choices and answer"
        )
    return Score(float(extract_letter(prediction, reference.choices) == reference.answer))


def extract_letter(text: str, choices: tuple[str, ...]) -> str | None:
    """The letter that the text names: by itself, or by the full text of exactly one option; None if it names none."""
    letters = string.ascii_uppercase[: len(choices)]
    for form in LETTER_FORMS:
        match = form.fullmatch(text.strip())
        if match and match[1] in letters:
            return match[1]
    given = normalise(text)
    named = [letter for letter, choice in zip(letters, choices, strict=True) if given and given == normalise(choice)]
    return named[0] if len(named) == 1 else None
