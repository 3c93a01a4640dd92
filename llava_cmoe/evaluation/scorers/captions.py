"""Captions against all captions of a picture: the mean of BLEU-1 to 4, METEOR, ROUGE-L and CIDEr over a whole task.

As UCIT's tables have it, with the metrics of MS COCO's evaluation (package `pycocoevalcap`). BLEU, METEOR and CIDEr
look at all captions at once, so the accuracy is no mean over answers, and an answer's value depends on the others.
CIDEr reaches 10, hence the accuracy may exceed 100 %. METEOR is a Java program whose loading takes some ten seconds a
task. Unicode's several spellings of one text (`data/spelling.py`) are made one first, as everywhere in `strict`.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence

from llava_cmoe.data import demands
from llava_cmoe.data.spelling import respell
from llava_cmoe.evaluation.scorers.base import Reference, Scorer, TaskScore, mean
from llava_cmoe.settings.base import RecipeError, shown
from llava_cmoe.settings.evaluation import EvaluationSettings


def build(settings: EvaluationSettings) -> Scorer:
    """The scorer, once it is clear that it can run here.

    Raises:
        RecipeError: the package or Java is missing; names the command that brings it.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise RecipeError("scorer captions: package pycocoevalcap is missing; pip install pycocoevalcap")
    if shutil.which("java") is None:
        raise RecipeError(
            "scorer captions: no `java` on the PATH, which METEOR and the tokenizer run on; "
            "install a Java runtime, 8 or newer (apt-get install default-jre-headless)"
        )
    return score


def score(texts: Sequence[str], references: Sequence[Reference]) -> TaskScore:
    """The mean of the seven metrics; each of them, as a fraction of one, in `detail`.

    Raises:
        ValueError: a row has no caption.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    given = tokenizer.tokenize({place: [_line(text)] for place, text in enumerate(texts)})
    true = tokenizer.tokenize({place: _captions(reference) for place, reference in enumerate(references)})
    bleu, bleus = Bleu(4).compute_score(true, given, verbose=0)
    measured = {f"bleu_{length + 1}": (bleu[length], bleus[length]) for length in range(4)}
    for name, metric in (("meteor", Meteor()), ("rouge_l", Rouge()), ("cider", Cider())):
        measured[name] = metric.compute_score(true, given)
    detail = {name: float(whole) for name, (whole, _) in measured.items()}
    values = zip(*(each for _, each in measured.values()), strict=True)
    return TaskScore(mean(list(detail.values())), tuple(float(mean(numbers)) for numbers in values), detail)


def _captions(reference: Reference) -> list[dict[str, str]]:
    try:
        demands.captions(reference)
    except ValueError as error:
        raise ValueError(f"row {shown(reference.id)}: {error}") from error
    return [_line(caption) for caption in reference.answers or (reference.answer,)]


def _line(text: str) -> dict[str, str]:
    """A caption that stays one line and one field in the Java programs; a stop, which they drop, stands for nothing."""
    line = " ".join(respell(text).replace("|", " ").split()) or "."
    return {"caption": line.encode(errors="replace").decode()}
