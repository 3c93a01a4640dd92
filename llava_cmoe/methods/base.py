"""The contract between a method and everything that drives it: a few verbs, the same for every method.

The trainer, the registry and the evaluation never ask which method they serve. A method keeps nothing between tasks
that it does not return from `learn`, so what is on disk is all there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_cmoe.backbones.feature_store import FeatureStore
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.conversation import Processor
from llava_cmoe.data.encoding import PromptRows, SampleRows
from llava_cmoe.experts.ledger import Size
from llava_cmoe.experts.surgery import ExpertHost
from llava_cmoe.records import Growth, Learned, Located, StageReport

Tensors = Mapping[str, Mapping[str, Tensor]]
"""A task's tensors by file stem, as `Learned.tensors` holds them and the registry gives them back."""

ExtraLoss = Callable[[ModelOutput], Tensor | float]
"""Called with what the model returned: what a method adds to the language-modelling loss of the batch."""

TrainingContext = Callable[[Batch], AbstractContextManager[ExtraLoss]]
"""Opened around a training forward pass of a batch. The batch also holds `row` (B,): the place of each sample among
those that `fit` was given, -1 for a sample that only fills up a batch."""

DeferredLocation = Callable[[], Located | None]
"""Called after the model has read the prompts: which task each belongs to; None where no locator decided."""


class FitFn(Protocol):
    """Trains the model's trainable parameters on some rows, with the run's training settings where none are given."""

    def __call__(
        self,
        samples: Dataset[dict[str, Tensor]],
        training_context: TrainingContext,
        *,
        label: str,
        epochs: float | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
    ) -> StageReport:
        """One `transformers.Trainer` from start to end; may be called as often as a method likes."""
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
        past: the samples of each earlier stage, in order, encoded when they are read; empty for a method that may not
            use them (`Method.uses_past`).
    """

    index: int
    name: str
    samples: SampleRows
    prompts: PromptRows
    seed: int
    features: FeatureStore | None = None
    past: Sequence[SampleRows] = ()


@dataclass(frozen=True)
class PlannedFit:
    """One training within a stage, before anything is learned; None leaves it to the run's training settings.

    Attributes:
        stage: index of the stage.
        label: as `fit` is given it.
        num_sites: sites where the stage adds experts that stay; None for a method that adds none.
        row_share: share of the stage's rows that it reads.
        epochs: passes over these.
        batch_size: samples per step and process, before accumulation.
        also_stored: what the stage stores besides what it trains, such as a locator.
    """

    stage: int
    label: str
    num_sites: int | None = None
    row_share: float = 1.0
    epochs: float | None = None
    batch_size: int | None = None
    also_stored: Size = field(default_factory=Size)


@dataclass(frozen=True)
class Costs:
    """What a method takes, in words and formulas for people.

    In formulas r is the rank, I and O are the widths of a linear, D is that of the hidden state, T the tasks so far.

    Attributes:
        trained: parameters that a task trains.
        stored: what a task's directory holds.
        answer: what an answer computes beyond the base model.
    """

    trained: str
    stored: str
    answer: str


class Method(ABC):
    """One way to learn a sequence of tasks on a frozen backbone.

    Attributes:
        model: what is trained and generates; the backbone with whatever the method put around or into it.
        processor: the backbone's processor.
        host: the banks that hold its experts; None for a method without.
        locates: whether `answering` finds the task of a prompt by itself; without it all tasks are answered alike.
        uses_past: whether it learns from rows of earlier tasks.
        costs: what it takes.
    """

    model: PreTrainedModel
    processor: Processor
    host: ExpertHost | None = None
    locates: ClassVar[bool] = False
    uses_past: ClassVar[bool] = False
    costs: ClassVar[Costs]

    @abstractmethod
    def __init__(self, settings: Any, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Prepare the backbone; `seed` draws whatever is initialised at random."""

    @classmethod
    def refusal(cls, settings: Any, zero_stage: int) -> str | None:
        """Why it cannot learn under DeepSpeed's ZeRO of this stage, and what to choose instead; None if it can."""
        del settings, zero_stage
        return None

    @classmethod
    def stages(cls, task_names: tuple[str, ...]) -> tuple[Stage, ...]:
        """The stages of a run: one per task, measured after each, unless a method says otherwise."""
        return tuple(Stage(name, (index,), index) for index, name in enumerate(task_names))

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """Grow as a run's stages would, and yield at each of their fits, while what it trains requires gradients.

        What the last fit of a stage trains, the stage stores. By default every stage trains what the method trains now;
        one that adds parameters for a stage must say so here.

        Args:
            num_stages: stages that learn.
            num_grown: sites that grow in each stage after the first; as many as the settings make likely where absent.
                Without effect on a method that adds no experts.
        """
        del num_grown
        for stage in range(num_stages):
            yield PlannedFit(stage, "training")

    def learn(self, data: StageData, fit: FitFn) -> Learned:
        """Learn one stage, and return everything that it taught."""
        growth = self.before_task(data, fit)
        report = fit(data.samples, self.training_context, label="training")
        return with_report(self.after_task(data), growth, report)

    def before_task(self, data: StageData, fit: FitFn) -> Growth:
        """Add what this task needs and make it trainable; by default nothing is added."""
        del data, fit
        return Growth(new_experts={})

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """Context of a training forward pass; by default the plain model and no extra loss."""
        del batch
        yield no_extra_loss

    @abstractmethod
    def after_task(self, data: StageData) -> Learned:
        """Freeze, fit and return everything that this task taught."""

    @abstractmethod
    def restore(self, tensors: Tensors) -> None:
        """Add the next task from what `learn` returned; tasks come back in order."""

    def answering(self, batch: Batch, task_B: Tensor | None = None) -> AbstractContextManager[DeferredLocation]:
        """Answer these prompts inside.

        Args:
            batch: the prompts.
            task_B: whose routers answer each sample, -1 for the base model; the method finds out where absent. Without
                effect on a method that answers alike for all tasks.
        """
        del batch, task_B
        return nullcontext(lambda: None)

    @property
    def answers_by_task(self) -> bool:
        """Whether prompt and task decide an answer for good, so that each pair of them need be answered only once.

        True only where an answer given a task, -1 included, never changes whatever is learned later, and where a prompt
        that `locate` finds to be of a task gets the answer that it gets given that task.
        """
        return False

    def locate(self, batch: Batch) -> Located | None:
        """The task of each prompt, without answering; None where only answering tells, or nothing does."""
        del batch
        return None


def no_extra_loss(output: ModelOutput) -> float:
    """The loss term of a method without any."""
    del output
    return 0.0


def zero3_refusal(zero_stage: int, reason: str) -> str | None:
    """The refusal of a method that reads weights outside the forward pass of their module; `reason` ends in these."""
    return f"{reason}, ZeRO-3 spreads them; choose zero_configs/zero2.yaml" if zero_stage == 3 else None


def with_report(learned: Learned, growth: Growth, report: StageReport) -> Learned:
    """What was learned, with how it grew and trained in its facts, and what that took in its seconds."""
    facts = {
        part: {key: value for key, value in asdict(values).items() if not key.endswith("seconds")}
        for part, values in (("growth", growth), ("training", report))
    }
    seconds = {"probing": growth.probe_seconds, "training": report.seconds}
    return replace(learned, facts={**learned.facts, **facts}, seconds={**seconds, **learned.seconds})
