"""What a run's record may not decide for whoever opens it: a run may be somebody else's, downloaded.

Its settings describe what was measured. The address of a judge among them is no reason to send it anybody's key, a
folder no reason to write there, a model's name no reason to download it; what changes no result is for whoever works
with the run now.
"""

from __future__ import annotations

from typing import Any, TypeVar

from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.base import Settings
from llava_cmoe.settings.evaluation import EvaluationSettings, JudgeSettings
from llava_cmoe.settings.run import Recipe

AnySettings = TypeVar("AnySettings", bound=Settings)


class RecordedJudge(JudgeSettings):
    """A judge that a run's record names, and not the user of this call."""


class RecordedBackbone(BackboneSettings):
    """A backbone that a run's record names: it is read where it is here, and never fetched."""


def as_recorded(settings: AnySettings) -> AnySettings:
    """The same settings, known to come from a run's record."""
    if isinstance(settings, Recipe):
        here: dict[str, Any] = {
            "backbone": RecordedBackbone.model_validate(settings.backbone.model_dump()),
            "evaluation": as_recorded(settings.evaluation),
            "data": settings.data.model_copy(update={"feature_store": None, "workers": 0}),
            "training": settings.training.model_copy(update={"report_to": None}),
        }
        return settings.model_copy(update=here)
    if isinstance(settings, EvaluationSettings) and settings.judge is not None:
        return settings.model_copy(update={"judge": RecordedJudge.model_validate(settings.judge.model_dump())})
    return settings
