"""The backbone as it is: learns nothing, answers everything; the lower bound of every table."""

from __future__ import annotations

from transformers import PreTrainedModel

from llava_cmoe.data.conversation import Processor
from llava_cmoe.methods.base import Costs, Method, Stage, StageData, Tensors
from llava_cmoe.records import Learned
from llava_cmoe.settings.methods.zero_shot import ZeroShotSettings


class ZeroShot(Method):
    """No stage at all, and one row of the matrix."""

    costs = Costs(
        trained="0",
        stored="nothing",
        answer="nothing",
    )

    def __init__(self, settings: ZeroShotSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Take the backbone."""
        del settings, seed
        self.model, self.processor = model, processor

    @classmethod
    def stages(cls, task_names: tuple[str, ...]) -> tuple[Stage, ...]:
        """One stage that learns from no task."""
        return (Stage("zero_shot", (), len(task_names) - 1),)

    def after_task(self, data: StageData) -> Learned:
        """Nothing was learned."""
        raise AssertionError("zero_shot has no task to finish")

    def restore(self, tensors: Tensors) -> None:
        """Nothing to bring back."""
        raise AssertionError("zero_shot has no task to restore")
