"""Losses are reported where the recipe says, into the run by default, and a tracker that is not there is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from tiny import Lesson
from transformers.integrations import is_tensorboard_available

from llava_cmoe import sequence
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.training import TrainingSettings
from llava_cmoe.training import trackers
from llava_cmoe.training.trackers import tensorboard_callbacks, trackers_of


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that only these trackers are installed."""
    return lambda *names: monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: list(names))


def test_tensorboard_is_the_default_where_it_is_installed(installed: Callable[..., None]):
    installed("wandb", "tensorboard")
    assert trackers_of(TrainingSettings()) == ("tensorboard",)
    assert trackers_of(TrainingSettings(report_to=())) == ()
    installed("wandb")
    assert trackers_of(TrainingSettings()) == ()
    assert trackers_of(TrainingSettings(report_to=("wandb",))) == ("wandb",)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_read(
    installed: Callable[..., None], tiny_backbone: Path, tmp_path: Path
):
    installed("tensorboard")
    wanted = "training.report_to=[tensorboard, trackio]"
    recipe = tiny.recipe(tmp_path / "run", Path("/no/such/root"), tiny_backbone, "cmoe", wanted)
    with pytest.raises(RecipeError, match=r"report_to names trackio, which is not installed; .*pip install trackio"):
        sequence.learn(recipe)


def test_nothing_is_reported_but_where_it_was_asked_for(tmp_path: Path):
    assert tensorboard_callbacks(("wandb",), tmp_path) == []


@pytest.mark.skipif(not is_tensorboard_available(), reason="tensorboard is not installed")
def test_every_training_has_a_folder_of_its_own_and_the_results_do_not_know(
    lesson_of: Callable[[str], Lesson], tiny_data: Path, tiny_backbone: Path, tmp_path: Path
):
    logs = {path.parent for path in (lesson_of("cmoe").recipe.run / "logs").rglob("events.out.*")}
    parts = ["01_colours/training", "02_sides/probing", "02_sides/training"]
    assert logs == {lesson_of("cmoe").recipe.run / "logs" / part for part in parts}
    silent = tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "cmoe", "training.report_to=[]")
    sequence.learn(silent)
    assert not (silent.run / "logs").exists()
    reported, unreported = (Registry(run).records()[-1] for run in (lesson_of("cmoe").recipe.run, silent.run))
    assert reported.sha256 == unreported.sha256
