"""Where losses and learning rates go while a stage trains: TensorBoard's files in the run, or a service's own place.

They tell times and machines, so nothing of a run's results is computed from them, and no hash covers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, get_available_reporting_integrations

from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.training import TrainingSettings


def trackers_of(settings: TrainingSettings) -> tuple[str, ...]:
    """Names of the trackers to report to; where none is asked for, TensorBoard if it is installed.

    Raises:
        RecipeError: one is asked for and not installed; names the package.
    """
    installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    if settings.report_to is None:
        return ("tensorboard",) if "tensorboard" in installed else ()
    for name in settings.report_to:
        if name not in installed:
            raise RecipeError(
                f"training.report_to names {name}, which is not installed; install it (pip install {name}), or leave "
                "it out"
            )
    return settings.report_to


def trainer_integrations(trackers: Sequence[str]) -> list[str]:
    """The trackers that the Trainer starts itself; TensorBoard's files get a place of this project's choice."""
    return [name for name in trackers if name != "tensorboard"]


def tensorboard_callbacks(trackers: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """TensorBoard writing into `folder`, if it is among the trackers."""
    if "tensorboard" not in trackers:
        return []
    callback = TensorBoardCallback()  # type: ignore[no-untyped-call]
    callback.logging_dir = str(folder)
    return [callback]
