"""Route plans: whose routers serve which sample, for a whole forward pass or a whole generation.

Who makes a plan (locator, oracle, method) is not known here; what a plan does to a token is `routers/`'s, when it is in
force `context.py`'s. Shape letters: B batch, K tasks mixed for one sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llava_cmoe.records import Located


@dataclass(frozen=True)
class RoutePlan:
    """Whose routers serve each sample of a batch.

    Attributes:
        tasks_BK: task indices mixed for each sample; -1 means no experts. B = 1 serves every sample of the batch.
        weights_BK: weight of each of those tasks.
        distinct: the task indices in the plan, each once, ascending, kept on the host.
        decided: what a router works out at prefill and reads again while decoding, by its own key.
        known: experts that any of the tasks knows, by the `id` of the router, kept on the host.
    """

    tasks_BK: Tensor
    weights_BK: Tensor
    distinct: tuple[int, ...]
    decided: dict[str, Tensor] = field(default_factory=dict, compare=False)
    known: dict[int, tuple[int, ...]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Check shapes; values stay unread, as reading them would wait for the device."""
        if self.tasks_BK.ndim != 2 or self.tasks_BK.shape != self.weights_BK.shape:
            raise ValueError(
                f"a route plan needs tasks_BK and weights_BK of one shape (B, K), "
                f"got {tuple(self.tasks_BK.shape)} and {tuple(self.weights_BK.shape)}"
            )

    @property
    def max_task(self) -> int:
        """Largest task index in the plan."""
        return self.distinct[-1]

    @classmethod
    def single(cls, task: int) -> RoutePlan:
        """One task for the whole batch; the plan of training and probing."""
        return cls(torch.tensor([[task]]), torch.tensor([[float(task >= 0)]]), (task,))

    @classmethod
    def of(cls, located: Located) -> RoutePlan:
        """The located tasks' routers; one task's alone where all samples are of one.

        Costs one host sync for a tensor on an accelerator, once per prompt batch.
        """
        distinct = tuple(torch.unique(located.tasks_BK).tolist())
        if len(distinct) == 1:
            return cls.single(distinct[0])
        return cls(located.tasks_BK, located.weights_BK, distinct)

    def to(self, device: torch.device) -> RoutePlan:
        """The same plan with its tensors on `device`."""
        return replace(self, tasks_BK=self.tasks_BK.to(device), weights_BK=self.weights_BK.to(device))
