"""Joint training: the adapter of `sequential_lora`, trained once on the union of all tasks; the upper bound."""

from __future__ import annotations

from llava_cmoe.methods.base import Costs, Stage
from llava_cmoe.methods.sequential_lora import SequentialLora


class Joint(SequentialLora):
    """One stage over all tasks; only the last row of the matrix can be measured."""

    costs = Costs(
        trained="r * (I + O) per linear, once",
        stored="the adapter, once",
        answer="one adapter",
    )

    @classmethod
    def stages(cls, task_names: tuple[str, ...]) -> tuple[Stage, ...]:
        """All tasks at once."""
        return (Stage("joint", tuple(range(len(task_names))), len(task_names) - 1),)
