"""Route plans (whose routers serve which sample) and the context that hands the current one to every bank.

Who makes a plan (locator, oracle, method) is not known here; what a plan does to a token is `routers.py`.
Shape letters: B batch, I images of the batch (or crops or patches of them), T tokens, E experts, K tasks mixed for one
sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from llava_cmoe.records import Mixture

SampleOfRows = Callable[[int], Tensor]
"""Which sample each of so many rows belongs to, (I,): parts of a model that read images have as many as they like."""


@dataclass(frozen=True)
class RoutePlan:
    """Whose routers serve each sample of a batch, for a whole forward pass or a whole generation.

    Attributes:
        tasks_BK: task indices mixed for each sample; -1 means no experts. B = 1 serves every sample of the batch.
        weights_BK: weight of each of those tasks.
        newest: largest task index in the plan, kept on the host. Banks compute only the experts that this task's
            router knows: an old task's arithmetic keeps its shapes, hence its bits, whatever is learned later.
        mask_BT: True for tokens that are not padding, or (B, 1) for all of a row; read only where gates are observed.
        sample_I: sample of each row of the forward pass where a row is an image; None where row b is sample b.
    """

    tasks_BK: Tensor
    weights_BK: Tensor
    newest: int
    mask_BT: Tensor | None = None
    sample_I: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes; values stay unread, as reading them would wait for the device."""
        if self.tasks_BK.ndim != 2 or self.tasks_BK.shape != self.weights_BK.shape:
            raise ValueError(
                f"a route plan needs tasks_BK and weights_BK of one shape (B, K), "
                f"got {tuple(self.tasks_BK.shape)} and {tuple(self.weights_BK.shape)}"
            )

    @classmethod
    def single(cls, task: int, mask_BT: Tensor | None = None) -> RoutePlan:
        """One task for the whole batch; the plan of training and probing."""
        return cls(torch.tensor([[task]]), torch.tensor([[float(task >= 0)]]), task, mask_BT)

    @classmethod
    def hard(cls, task_B: Tensor, mask_BT: Tensor | None = None) -> RoutePlan:
        """One task per sample. Costs one host sync for a tensor on an accelerator, once per prompt batch."""
        tasks_BK = task_B.long().unsqueeze(1)
        return cls(tasks_BK, (tasks_BK >= 0).float(), int(task_B.max()), mask_BT)

    @classmethod
    def soft(cls, mixture: Mixture) -> RoutePlan:
        """Several tasks per sample, weighted; the same host sync."""
        return cls(mixture.tasks_BK, mixture.weights_BK, int(mixture.tasks_BK.max()))

    def of_images(self, sample_I: Tensor) -> RoutePlan:
        """The same plan where a row is an image, given its sample: all its patches count if any token there does."""
        seen_I1 = None if self.mask_BT is None else self.mask_BT.any(dim=1, keepdim=True)[sample_I]
        return replace(self, sample_I=sample_I, mask_BT=seen_I1)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Tasks and their weights for each row of the forward pass, each (B, K) or (I, K)."""
        if self.sample_I is None:
            return self.tasks_BK, self.weights_BK
        return self.tasks_BK[self.sample_I], self.weights_BK[self.sample_I]

    def to(self, device: torch.device) -> RoutePlan:
        """The same plan with its tensors on `device`."""
        moved = {
            name: value.to(device)
            for name in ("tasks_BK", "weights_BK", "mask_BT", "sample_I")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


class Observation:
    """What banks saw while it was open, summed over forward passes; tensors stay on the device until they are read.

    Reading the balance loss ends it: with gradient checkpointing, what runs in backward was seen before.

    Attributes:
        counts: site name to the number of top-k slots of non-pad tokens that each expert got (int64, width E).
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.counts: dict[str, Tensor] = {}
        self._probability: dict[str, Tensor] = {}
        self._ended = False

    def add(self, site: str, counts_E: Tensor, probability_E: Tensor) -> None:
        """Called by banks: slot counts and summed softmax probabilities of one forward pass over one site."""
        if self._ended:
            return
        if site not in self.counts:
            self.counts[site], self._probability[site] = counts_E, probability_E
        elif self.counts[site].shape == counts_E.shape:
            self.counts[site] = self.counts[site] + counts_E
            self._probability[site] = self._probability[site] + probability_E
        else:
            raise ValueError(
                f"{site}: observed {len(counts_E)} experts after {len(self.counts[site])}; "
                "observe plans with different newest tasks separately"
            )

    def balance_loss(self) -> Tensor:
        """Mean over sites of n * sum_e F_e P_e (Switch Transformer, Eq. 4; METHODS 1.2): 1 where use is uniform.

        F is the share of top-k slots an expert got, P its mean softmax probability, both over the non-pad tokens that
        all processes saw in this forward pass, so that several are one. Differentiable through this process's part of
        P; it is scaled for gradients that are averaged over processes. Costs one small sum over processes.

        Raises:
            ValueError: no bank with experts ran under a plan while this observation was open.
        """
        if not self.counts:
            raise ValueError("balance loss of nothing: run the model inside context.use(plan) and context.observe()")
        self._ended = True
        terms = []
        for probability_E, (counts_E, num_tokens) in zip(self._probability.values(), self._of_all(), strict=True):
            share_E = counts_E / counts_E.sum().clamp(min=1)
            total = num_tokens.clamp(min=torch.finfo(torch.float32).tiny)
            terms.append(len(counts_E) * (share_E * probability_E / total).sum())
        return torch.stack(terms).mean() * int(PartialState().num_processes)

    def _of_all(self) -> list[tuple[Tensor, Tensor]]:
        """Slot counts (E,) and number of tokens per site, summed over all processes; float32 holds 2^24 slots exactly.

        A token's probabilities sum to 1, so their total is the number of tokens: no second count to keep.
        """
        own = [
            torch.cat([counts_E.float(), self._probability[site].detach().sum(dim=0, keepdim=True)])
            for site, counts_E in self.counts.items()
        ]
        summed = reduce(torch.cat(own), "sum").split([len(part) for part in own])
        return [(part[:-1], part[-1]) for part in summed]


class RouteContext:
    """The plan and the observation in force, one context per model; banks read it, methods set it.

    With gradient checkpointing the plan must stay in use until backward is done: layers run again there.
    """

    def __init__(self) -> None:
        """No plan, no observation: the base model. `image_hook` is `images.py`'s, where banks serve images."""
        self.observation: Observation | None = None
        self.image_hook: RemovableHandle | None = None
        self._plan: RoutePlan | None = None
        self._sample_of: SampleOfRows | None = None
        self._image_plans: dict[tuple[int, torch.device], RoutePlan] = {}

    @contextmanager
    def use(self, plan: RoutePlan | None) -> Iterator[None]:
        """Route every forward inside by `plan` (None: the base model); the plan before comes back at the end."""
        before = self._plan, self._sample_of, self._image_plans
        self.turn_to(plan)
        try:
            yield
        finally:
            self._plan, self._sample_of, self._image_plans = before

    def turn_to(self, plan: RoutePlan | None) -> None:
        """Route by `plan` from here to the end of the innermost `use`; for a plan found inside a forward pass."""
        self._plan, self._sample_of, self._image_plans = plan, None, {}

    def read_images(self, sample_of: SampleOfRows) -> None:
        """Route each image that the model is about to read by its sample's part of the plan in use."""
        self._sample_of, self._image_plans = sample_of, {}

    @contextmanager
    def observe(self) -> Iterator[Observation]:
        """Let banks add up balance terms and expert counts of every forward inside."""
        before, self.observation = self.observation, Observation()
        try:
            yield self.observation
        finally:
            self.observation = before

    def plan_on(self, device: torch.device) -> RoutePlan | None:
        """The plan in use, moved to `device` at its first use there instead of at every site and decoding step."""
        if self._plan is not None and self._plan.tasks_BK.device != device:
            self._plan = self._plan.to(device)
        return self._plan

    def image_plan_on(self, device: torch.device, num_rows: int) -> RoutePlan | None:
        """The plan in use for the images that the model is reading, `num_rows` of them on this device.

        Raises:
            ValueError: a part of the model reads images on its own, and nobody has said whose they are.
        """
        plan = self.plan_on(device)
        if plan is None:
            return None
        if self._sample_of is None:
            raise ValueError(
                "which sample each image belongs to is not known; call the model with input_ids and pixel_values, "
                "not its vision encoder or projector alone"
            )
        if (num_rows, device) not in self._image_plans:
            self._image_plans[num_rows, device] = plan.of_images(self._sample_of(num_rows).to(device))
        return self._image_plans[num_rows, device]
