"""Features of prompts that no expert can move: read from the frozen model, of one batch or of all rows of a task.

Processes share the reading of a task's rows; what was read can be kept on disk (`backbones/feature_store.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.utils.data import Subset
from transformers import PreTrainedModel

from llava_cmoe.backbones.feature_store import FeatureStore
from llava_cmoe.backbones.features import Feature, check_layer, prompt_feature
from llava_cmoe.data.batches import Batch, batches
from llava_cmoe.data.conversation import Processor
from llava_cmoe.data.encoding import PromptRows
from llava_cmoe.experts.context import RouteContext
from llava_cmoe.settings.base import RecipeError

FEATURE_BATCH = 64
"""Prompts per forward pass when a task's features are read."""


@dataclass(frozen=True)
class FrozenFeatures:
    """One layer's state of a prompt, as one vector.

    Attributes:
        model: the backbone, with banks in it.
        processor: the backbone's.
        context: of the banks.
        layer: LLM layer whose states are read: 0 is the embedding, -1 the last layer.
        feature: of the last token, or the mean of all, of the picture's or of the other tokens.
    """

    model: PreTrainedModel
    processor: Processor
    context: RouteContext
    layer: int
    feature: Feature

    def __post_init__(self) -> None:
        """Raise a RecipeError for a layer that the model has not."""
        try:
            check_layer(self.model, self.layer)
        except ValueError as error:
            fix = "set the layer that the method reads features from, such as method.locator.layer"
            raise RecipeError(f"{error}; {fix}") from error

    def of(self, batch: Batch) -> Tensor:
        """Of a batch of prompts (B, D), in a pass of its own that stops at the layer."""
        with self.context.use(None):
            return prompt_feature(self.model, batch, self.layer, self.feature)

    def of_rows(self, prompts: PromptRows, store: FeatureStore | None = None) -> Tensor:
        """Of all rows (S, D), on the model's device."""
        if store is None:
            return self._read(prompts)
        read_as = {"feature": self.feature, "layer": self.layer, "batch": FEATURE_BATCH}
        return store.features(prompts, read_as, lambda: self._read(prompts)).to(self.model.device)

    def _read(self, prompts: PromptRows) -> Tensor:
        """Each process reads every so many batches in a row; all get all of it (S, D), as one alone would read it."""
        state, num_prompts = PartialState(), len(prompts)
        share = FEATURE_BATCH * ceil(num_prompts / (FEATURE_BATCH * state.num_processes))
        mine = range(num_prompts)[share * state.process_index :][:share] or range(1)  # a row that is cut off again
        rows = Subset(prompts, mine)
        read = batches(rows, self.processor, FEATURE_BATCH, self.model.device)
        own_SD = torch.cat([self.of(batch) for batch in read])
        whole_SD: Tensor = gather(pad_across_processes(own_SD))
        return whole_SD[:num_prompts]


def normalised(feature_BD: Tensor) -> Tensor:
    """Features in float32, each with mean 0 and variance 1: what routers and clusters read."""
    return layer_norm(feature_BD.float(), feature_BD.shape[-1:])
