"""An LLM says whether an answer means the same as the reference; off unless a recipe names one (`evaluation.judge`).

For open answers that no rule can judge. Its verdicts are not stable: the same model judges otherwise after an update of
its server, with another batch beside it or on other hardware, greedily decoded and seeded as it is here. So they
compare answers judged in one go, at best; keep the answers, and never put such a number beside one from elsewhere.
Within one process no answer is judged twice; every evaluation asks anew.

A key goes where the user of this call says: to the judge of a recipe that they give, or to OPENAI_BASE_URL. An address
that only a run's record names gets none.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial

from llava_cmoe.data.spelling import is_blank
from llava_cmoe.evaluation.scorers.base import Reference, Score, Scorer, each
from llava_cmoe.settings.base import RecipeError, shown
from llava_cmoe.settings.evaluation import EvaluationSettings, JudgeSettings
from llava_cmoe.settings.recorded import RecordedJudge

INSTRUCTION = (
    "You compare a given answer to a question about a picture, which you do not see, with the correct answer. "
    "Reply with one word: yes if the given answer means the same as the correct one, else no."
)

SECRETS = ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")
"""Environment variables that the client sends to whatever endpoint it is given."""


def build(settings: EvaluationSettings) -> Scorer:
    """The scorer, once it is clear that a judge is named and the client is there; nothing is asked yet.

    Raises:
        RecipeError: no judge, or no client, or a key that would go to an address which only a run names; names the fix.
    """
    if settings.judge is None:
        raise RecipeError(
            "scorer llm_judge: no judge is named; set evaluation.judge.model and evaluation.judge.url "
            "(an OpenAI-compatible endpoint), or choose a scorer that needs none"
        )
    _check_address(settings.judge)
    if importlib.util.find_spec("openai") is None:
        raise RecipeError("scorer llm_judge: package openai is missing; pip install openai")
    return each(partial(score, settings.judge))(settings)


def _check_address(judge: JudgeSettings) -> None:
    own = os.environ.get("OPENAI_BASE_URL", "")
    held = [name for name in SECRETS if os.environ.get(name)]
    if held and isinstance(judge, RecordedJudge) and judge.url.rstrip("/") != own.rstrip("/"):
        raise RecipeError(
            f"scorer llm_judge: this run's record names the judge at {judge.url}, and {held[0]} is set; set "
            f"OPENAI_BASE_URL={judge.url} to send it there, or unset {held[0]}"
        )


def score(judge: JudgeSettings, prediction: str, reference: Reference) -> Score:
    """1 if the judge says yes, 0 if no; an empty answer is wrong without asking.

    Raises:
        ValueError: the endpoint does not answer, or says neither.
    """
    if is_blank(prediction):
        return Score(0.0)
    correct = " / ".join(dict.fromkeys(reference.answers)) or reference.answer
    question = reference.question.replace("<image>", "").strip()
    asked = f"Question: {question}\nCorrect answer: {correct}\nGiven answer: {prediction}"
    reply = _asker(judge)(asked)
    word = reply.strip().strip(".!\"'").lower()
    if word not in ("yes", "no"):
        raise ValueError(
            f"{judge.model} replied {shown(reply)} where yes or no is asked; name a judge that follows that"
        )
    return Score(float(word == "yes"))


@cache
def _asker(judge: JudgeSettings) -> Callable[[str], str]:
    """Sends one question, and remembers the reply; the client is made once."""
    from openai import OpenAI, OpenAIError

    # A local server wants no key, the client does.
    client = OpenAI(base_url=judge.url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=judge.timeout)

    @cache
    def ask(asked: str) -> str:
        try:
            completion = client.chat.completions.create(
                model=judge.model,
                messages=[{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": asked}],
                temperature=0,
                seed=judge.seed,
            )
        except OpenAIError as error:
            raise ValueError(f"judge {judge.model} at {judge.url}: {error}; check evaluation.judge") from error
        return completion.choices[0].message.content or ""

    return ask
