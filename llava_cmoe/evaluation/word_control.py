"""The control of every locator: how often the words of a prompt alone name its task, by naive Bayes.

A locator that does no better has read the question's form and nothing of the picture.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from llava_cmoe.data.rows import MARKER

LARGEST = 5000
"""Questions per task that are counted; more change little and cost seconds after every task."""


def word_control(learned: Mapping[str, Sequence[str]], asked: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Percent of each task's questions that multinomial naive Bayes gives to that task.

    Counts are smoothed by one, tasks are equally likely beforehand, words that no task was taught say nothing.

    Args:
        learned: task to its training questions.
        asked: task to the questions to be located among the same tasks.
    """
    counts = [Counter(word for text in texts[:LARGEST] for word in words_of(text)) for texts in learned.values()]
    place = {word: index for index, word in enumerate(sorted(set().union(*counts)))}
    log_p = np.log(np.array([[count[word] + 1 for word in place] for count in counts], dtype=float))
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    right = {}
    for task, name in enumerate(learned):
        located = [
            int(log_p[:, [place[word] for word in words_of(text) if word in place]].sum(axis=1).argmax())
            for text in asked[name]
        ]
        right[name] = 100 * located.count(task) / len(located)
    return right


def words_of(text: str) -> list[str]:
    """Words and marks, in lower case, without the place of the picture."""
    return re.findall(r"\w+|[^\w\s]", text.replace(MARKER, " ").casefold())
