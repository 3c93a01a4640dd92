"""Experience replay: sequential LoRA on the rows of the task and a kept part of the rows of every task before.

The one baseline here that keeps samples. Kept rows are drawn once, from the run's seed and the task's place, and are
read once an epoch among the new ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedModel

from llava_cmoe.data.conversation import Processor
from llava_cmoe.methods.base import Costs, FitFn, PlannedFit, StageData, with_report
from llava_cmoe.methods.sequential_lora import SequentialLora
from llava_cmoe.records import Growth, Learned
from llava_cmoe.settings.methods.replay import ReplaySettings


class Replay(SequentialLora):
    """One adapter that every task trains on, together with what is kept of the tasks before."""

    costs = Costs(
        trained="r * (I + O) per linear",
        stored="the adapter; old rows are drawn again from the data",
        answer="one adapter",
    )

    uses_past = True

    def __init__(self, settings: ReplaySettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Nothing is kept yet."""
        super().__init__(settings, model, processor, seed)
        self.settings, self.seed = settings, seed

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """The one adapter for every task; every earlier task is taken to have as many rows as the task itself."""
        del num_grown
        for stage in range(num_stages):
            yield PlannedFit(stage, "training", row_share=1 + stage * self.settings.fraction)

    def learn(self, data: StageData, fit: FitFn) -> Learned:
        """Train on the new rows and the kept ones."""
        kept = [
            Subset(rows, kept_rows(len(rows), self.settings.fraction, f"{self.seed}/{task}"))
            for task, rows in enumerate(data.past)
        ]
        report = fit(ConcatDataset([data.samples, *kept]), self.training_context, label="training")
        learned = with_report(self.after_task(data), Growth({}), report)
        return Learned(learned.tensors, {**learned.facts, "replayed_rows": sum(map(len, kept))}, learned.seconds)


def kept_rows(num_rows: int, fraction: float, seed: str) -> list[int]:
    """Which of so many rows are kept, in order; the same ones whenever it is asked."""
    return sorted(Random(seed).sample(range(num_rows), max(1, round(num_rows * fraction))))
