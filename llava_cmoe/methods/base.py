"""The contract between a method and everything that drives it: a few verbs, the same for every method.

The trainer, the registry and the evaluation never ask which method they serve. A method keeps nothing between tasks
that it does not return from `after_task`, so what is on disk is all there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from llava_cmoe.backbones.feature_store import FeatureStore
from llava_cmoe.data.conversation import Processor
from llava_cmoe.data.encoding import PromptRows, SampleRows
from llava_cmoe.records import Growth, Learned, Located, Mixture, StageReport

Batch = Mapping[str, Tensor]
Tensors = Mapping[str, Mapping[str, Tensor]]
"""A task's tensors by file stem, as `Learned.tensors` holds them and the registry gives them back."""

ExtraLoss = Callable[[], Tensor | float]
"""Read after the forward pass: what a method adds to the language-modelling loss of the batch."""

LateVerdict = Callable[[], Located | None]
"""Read after the model has read the prompts: which task each belongs to; None for a method that does not ask."""

Learning = Callable[[Batch], AbstractContextManager[ExtraLoss]]
"""Opened around a training forward pass of a batch."""


class Teach(Protocol):
    """Trains the model's trainable parameters on some rows, with the run's training settings where none are given."""

    def __call__(
        self,
        samples: Dataset[dict[str, Tensor]],
        learning: Learning,
        *,
        label: str,
        epochs: float | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
    ) -> StageReport:
        """One `transformers.Trainer` from start to end."""
        ...


@dataclass(frozen=True)
class Stage:
    """What is learned in one go, and when it is measured.

    Attributes:
        name: of the stage, hence of its directory.
        learns: indices of the sequence's tasks whose rows are learned.
        after: row of the accuracy matrix that is measured when the stage is done.
    """

    name: str
    learns: tuple[int, ...]
    after: int


@dataclass(frozen=True)
class StageData:
    """One stage as a method gets it.

    Attributes:
        index: of the stage, from 0.
        name: of the stage.
        samples: its rows, whole, to learn from.
        prompts: the same rows without answers.
        seed: of everything random in it.
        features: where its prompts' features are kept on disk; None to read them from the model.
    """

    index: int
    name: str
    samples: SampleRows
    prompts: PromptRows
    seed: int
    features: FeatureStore | None = None


class Method(ABC):
    """One way to learn a sequence of tasks on a frozen backbone.

    Attributes:
        model: what is trained and generates; the backbone with whatever the method put around or into it.
        processor: the backbone's processor.
    """

    model: PreTrainedModel
    processor: Processor

    @abstractmethod
    def __init__(self, settings: Any, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Prepare the backbone; `seed` draws whatever is initialised at random."""

    def stages(self, task_names: tuple[str, ...]) -> tuple[Stage, ...]:
        """The stages of a run: one per task, measured after each, unless a method says otherwise."""
        return tuple(Stage(name, (index,), index) for index, name in enumerate(task_names))

    def before_task(self, data: StageData, teach: Teach) -> Growth:
        """Decide what to add for this task, add it and make it trainable; by default nothing is added."""
        del data, teach
        return Growth(new_experts={})

    @contextmanager
    def learning(self, batch: Batch) -> Iterator[ExtraLoss]:
        """Context of a training forward pass; by default the plain model and no extra loss."""
        del batch
        yield float

    @abstractmethod
    def after_task(self, data: StageData, growth: Growth) -> Learned:
        """Freeze, fit and hand over everything this task taught."""

    @abstractmethod
    def restore(self, tensors: Tensors) -> None:
        """Add the next task from what its `after_task` handed over; tasks come back in order."""

    def locate(self, batch: Batch) -> Located | None:
        """Which task each prompt belongs to; None for a method that does not ask."""
        del batch
        return None

    def routed(self, choice: Tensor | Mixture | None) -> AbstractContextManager[None]:
        """Answer with these tasks' routers inside, one or a mixture a sample (-1: the base model).

        Ignored by methods without routers.
        """
        del choice
        return nullcontext()

    @contextmanager
    def locating(self, batch: Batch) -> Iterator[LateVerdict]:
        """Answer these prompts inside, each with the routers of the task it is located at.

        By default `locate` looks at them first. A method that can locates while the model reads them.
        """
        located = self.locate(batch)
        with self.routed(located.choice if located else None):
            yield lambda: located
