"""One answer through the table of scorers, as a task of one question."""

from llava_cmoe.evaluation.scorers import Reference, TaskScore, get_scorer
from llava_cmoe.settings.evaluation import EvaluationSettings


def judge(name: str, text: str, reference: Reference, protocol: str = "strict") -> TaskScore:
    settings = EvaluationSettings.model_validate({"protocol": protocol})
    return get_scorer(name, settings)([text], [reference])


def value(name: str, text: str, reference: Reference, protocol: str = "strict") -> float:
    return judge(name, text, reference, protocol).accuracy
