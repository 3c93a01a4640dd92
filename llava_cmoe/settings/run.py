"""A recipe: everything that one run is made from."""

from __future__ import annotations

from pathlib import Path

from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.base import Settings
from llava_cmoe.settings.data import DataSettings
from llava_cmoe.settings.evaluation import EvaluationSettings
from llava_cmoe.settings.methods import MethodSettings
from llava_cmoe.settings.training import TrainingSettings


class Recipe(Settings):
    """A whole run: one method learns one sequence from one seed."""

    run: Path
    """Output directory of the run."""
    seed: int = 0
    """Seed of everything random in the run."""
    data: DataSettings = DataSettings()
    """What is learned."""
    backbone: BackboneSettings = BackboneSettings()
    """What is frozen."""
    method: MethodSettings
    """How it is learned."""
    training: TrainingSettings = TrainingSettings()
    """One stage of training."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """How it is measured."""
