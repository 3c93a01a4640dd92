"""Locating as one component: features of the frozen model, a locator fitted per task, prompts located as they are read.

Any method whose experts follow a plan can have it. What a task is modelled by is `locators/`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from llava_cmoe.backbones.features import feature_in_passing, feature_width
from llava_cmoe.backbones.sites import image_token_of
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.context import RouteContext
from llava_cmoe.experts.ledger import Size
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.locators import LOCATORS
from llava_cmoe.methods.base import DeferredLocation, StageData
from llava_cmoe.methods.frozen_features import FrozenFeatures
from llava_cmoe.records import Learned, Located
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.locators import LocatorSettings


class TaskLocating:
    """A locator over all tasks so far, and how a model that follows a route context answers by it."""

    def __init__(
        self, settings: LocatorSettings, model: PreTrainedModel, processor: Processor, context: RouteContext
    ) -> None:
        """No task is known yet.

        Raises:
            RecipeError: features of pictures are wanted from a model that reads text alone.
        """
        if settings.feature in ("vision", "both") and image_token_of(model) is None:
            raise RecipeError(
                f"method.locator.feature is {settings.feature}, but a {model.config.model_type} reads text alone; set "
                "it to last, mean or text"
            )
        self._settings, self._model, self._context = settings, model, context
        self.features = FrozenFeatures(model, processor, context, settings.layer, settings.feature)
        self._locator = LOCATORS[settings.kind](settings, device=model.device)

    def planned_size(self) -> Size:
        """What a task's locator will take, by fitting three features: the fewest that can be fitted."""
        locator = LOCATORS[self._settings.kind](self._settings.model_copy(update={"epochs": 1}))
        width = feature_width(self._model, self._settings.feature)
        with torch.device("cpu"):  # also where the model has no weights
            return ledger.size_of(locator.fit(torch.randn(3, width), seed=0).values())

    def learn_task(self, data: StageData, feature_SD: Tensor | None = None) -> Learned:
        """Fit the task's locator on the frozen model's features, read if not given, and know the task from here on."""
        began = time.monotonic()
        if feature_SD is None:
            feature_SD = self.features.of_rows(data.prompts, data.features)
        fitted = self._locator.fit(feature_SD, data.seed)
        # The one that is committed locates in all processes: fits on several GPUs may differ in their last bits.
        (location,) = broadcast_object_list([{name: tensor.cpu() for name, tensor in fitted.items()}])
        self.restore(location)
        size = ledger.size_of(location.values()).parameters
        return Learned({"locator": location}, {"locator_parameters": size}, {"locating": time.monotonic() - began})

    def restore(self, location: dict[str, Tensor]) -> None:
        """Know the next task by what `learn_task` returned for it."""
        self._locator.add(location)

    @contextmanager
    def answering(self, batch: Batch, task_B: Tensor | None) -> Iterator[DeferredLocation]:
        """Route these prompts inside, by the tasks given or else by those that they are located at.

        Located in a pass before or, with `locator.free`, inside the prefill.
        """
        if task_B is not None:
            with self._context.use(RoutePlan.of(Located.at(task_B)), batch):
                yield lambda: None
        elif self._settings.free:
            with self._locating_in_passing(batch) as location:
                yield location
        else:
            located = self.locate(batch)
            with self._context.use(RoutePlan.of(located), batch):
                yield lambda: located

    @property
    def chooses_one(self) -> bool:
        """Whether the task that a prompt is located at answers alone, as if it were given."""
        return self._settings.selection == "hard"

    def locate(self, batch: Batch) -> Located:
        """The task whose model finds each prompt most familiar; per sample, once per prompt."""
        return self.locate_feature(self.features.of(batch))

    def locate_feature(self, feature_BD: Tensor) -> Located:
        """The same of prompts whose feature is known."""
        return self._locator.locate(feature_BD)

    @contextmanager
    def _locating_in_passing(self, batch: Batch) -> Iterator[DeferredLocation]:
        """The first forward pass inside starts without experts and goes on, from the locator's layer, with a plan."""
        found: list[Located] = []

        def locate(feature_BD: Tensor) -> None:
            located = self._locator.locate(feature_BD)
            self._context.set_plan(RoutePlan.of(located))
            found.append(located)

        def location() -> Located:
            if not found:
                raise ValueError("nothing is located yet; let the model read the prompts first")
            return found[0]

        reading = feature_in_passing(self._model, batch, self._settings.layer, self._settings.feature, locate)
        with self._context.use(None, batch), reading:
            yield location
