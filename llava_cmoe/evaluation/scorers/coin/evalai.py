"""The form in which TextVQA's answers are compared: the answer processor of EvalAI's VQA evaluation, quirk by quirk.

Lower case; commas and question marks go; "'s" becomes a word of its own, *before* contractions are restored, so "thats"
becomes "that's", but "that's" becomes "that 's". A mark with a blank beside it anywhere in the answer is deleted
everywhere, any other becomes a blank. A stop stays only before a digit; from the 33rd on every stop stays (the scripts
pass a flag of value 32 where the number of replacements belongs). Number words become digits; articles go, even if
nothing is left. The evaluation's rule for "1,000" never applies: commas are gone by then.
"""

from __future__ import annotations

import re
from functools import lru_cache

MARKS = ';/[]"{}()=+\\_-><@`,?!'
STOP = re.compile(r"\.(?!\d)")
MOST_STOPS = 32

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}

RESTORED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
"""Contractions that the table restores; each is recognised with any one of its apostrophes missing.

The table's entries with a capital ("Im") are left out: answers are in lower case when it is asked. So are those that
restore a word to itself ("let's")."""

CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in RESTORED for place, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}  # the one entry that takes an apostrophe away


@lru_cache(maxsize=1 << 16)  # ten annotators agree more often than not
def process(answer: str) -> str:
    """The form that is compared; empty where the answer consists of articles and marks.

    >>> process("The Dont-Walk sign, 2.5 m.")
    "don't walk sign 2.5 m"
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [NUMBERS.get(word, word) for word in _without_marks(text).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_marks(text: str) -> str:
    kept = text
    for mark in MARKS:
        if mark in text:
            kept = kept.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    return STOP.sub("", kept, count=MOST_STOPS)
