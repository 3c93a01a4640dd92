"""What is in force while the model runs: the plan, the batch it reads, and who observes; one context per model.

Methods set it, the hook of `forward_hook.py` says when a pass begins, banks and routers read it.
Shape letters: B batch, T tokens, I images of the batch (or crops or patches of them), K tasks mixed for one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from llava_cmoe.data.conversation import IGNORED
from llava_cmoe.experts.observation import Observation
from llava_cmoe.experts.plan import RoutePlan

SampleOfRows = Callable[[int], Tensor]
"""Which sample each of so many rows belongs to, (I,): parts of a model that read images have as many as they like."""


@dataclass(frozen=True)
class ForwardPass:
    """What a router may know of the forward pass it decides in.

    Attributes:
        plan: whose routers serve each sample.
        batch: what the pass reads, as far as it is known: `input_ids`, `attention_mask`, `labels`.
        image_token: id of the tokens that stand for pictures; None for a model that reads text alone.
        is_prefill: whether this pass reads a whole prompt or sample, and is no step of decoding.
        sample_I: sample of each row where a row is an image; None where row b is sample b.
    """

    plan: RoutePlan
    batch: Mapping[str, Tensor] = field(default_factory=dict)
    image_token: int | None = None
    is_prefill: bool = True
    sample_I: Tensor | None = None

    @cached_property
    def mask_BT(self) -> Tensor | None:
        """True for tokens that are not padding, (I, 1) for rows that are images of a sample with any; None if unknown.

        All patches of a picture count if any token of its sample does.
        """
        mask = self.batch.get("attention_mask")
        if mask is None:
            return None
        mask_BT = mask.to(self.plan.tasks_BK.device).bool()
        return mask_BT if self.sample_I is None else mask_BT.any(dim=1, keepdim=True)[self.sample_I]

    @cached_property
    def prompt_mask_BT(self) -> Tensor:
        """True for the tokens before the first answer: all that a route may depend on."""
        mask_BT: Tensor = self.batch["attention_mask"].to(self.plan.tasks_BK.device).bool()
        labels = self.batch.get("labels")
        if labels is None:
            return mask_BT
        num_learned_BT = torch.ne(labels.to(mask_BT.device), IGNORED).cumsum(dim=1)
        return mask_BT & torch.eq(num_learned_BT, 0)

    @cached_property
    def image_mask_BT(self) -> Tensor:
        """True for the tokens that stand for pictures."""
        assert self.image_token is not None, "a model that reads pictures"
        return torch.eq(self.batch["input_ids"].to(self.plan.tasks_BK.device), self.image_token)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Tasks and their weights for each row of the pass, each (B, K) or (I, K)."""
        if self.sample_I is None:
            return self.plan.tasks_BK, self.plan.weights_BK
        return self.plan.tasks_BK[self.sample_I], self.plan.weights_BK[self.sample_I]


class RouteContext:
    """The plan, the batch and the observation in force.

    With gradient checkpointing a plan must stay in use until backward is done: layers run again there.
    """

    def __init__(self, image_token: int | None = None) -> None:
        """No plan, no observation: the base model. `hook` is `forward_hook.py`'s."""
        self.observation: Observation | None = None
        self.hook: RemovableHandle | None = None
        self._image_token = image_token
        self._plan: RoutePlan | None = None
        self._batch: Mapping[str, Tensor] = {}
        self._is_prefill = True
        self._sample_of: SampleOfRows | None = None
        self._passes: dict[tuple[int | None, torch.device], ForwardPass] = {}

    @contextmanager
    def use(self, plan: RoutePlan | None, batch: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Route every forward inside by `plan` (None: the base model); the plan before comes back at the end.

        Args:
            plan: whose routers serve.
            batch: what is read; routers that pool a prompt and whoever counts tokens need its masks.
        """
        before = self._plan, self._batch, self._is_prefill, self._sample_of, self._passes
        self._batch, self._is_prefill = batch or {}, True
        self.set_plan(plan)
        try:
            yield
        finally:
            self._plan, self._batch, self._is_prefill, self._sample_of, self._passes = before

    def set_plan(self, plan: RoutePlan | None) -> None:
        """Route by `plan` from here to the end of the innermost `use`; for a plan found inside a forward pass."""
        self._plan, self._sample_of, self._passes = plan, None, {}

    @contextmanager
    def observe(self) -> Iterator[Observation]:
        """Let banks add up balance terms and expert counts of every forward inside."""
        before, self.observation = self.observation, Observation()
        try:
            yield self.observation
        finally:
            self.observation = before

    def begin_pass(self, is_prefill: bool, sample_of: SampleOfRows | None = None) -> None:
        """A forward pass of the whole model begins.

        Args:
            is_prefill: whether it reads more than the next token.
            sample_of: whose the pictures are that it reads; None where it reads none.
        """
        if is_prefill != self._is_prefill:
            self._is_prefill, self._passes = is_prefill, {}
        if sample_of is not None:
            self._sample_of, self._passes = sample_of, {}

    @property
    def routes(self) -> bool:
        """Whether a plan is in use."""
        return self._plan is not None

    def forward_pass(self, device: torch.device) -> ForwardPass | None:
        """The pass that is running, its plan on `device`, made once per pass and not once per site; None: no plan."""
        if self._plan is None:
            return None
        found = self._passes.get((None, device))
        if found is None:
            if self._plan.tasks_BK.device != device:
                self._plan = self._plan.to(device)
            found = ForwardPass(self._plan, self._batch, self._image_token, self._is_prefill)
            self._passes[None, device] = found
        return found

    def image_pass(self, device: torch.device, num_rows: int) -> ForwardPass | None:
        """The same for the images that the model is reading, `num_rows` of them on this device.

        Raises:
            ValueError: a part of the model reads images on its own, and nobody has said whose they are.
        """
        whole = self.forward_pass(device)
        if whole is None:
            return None
        if self._sample_of is None:
            raise ValueError(
                "which sample each image belongs to is not known; call the model with input_ids and pixel_values, "
                "not its vision encoder or projector alone"
            )
        if (num_rows, device) not in self._passes:
            sample_I = self._sample_of(num_rows).to(device)
            self._passes[num_rows, device] = ForwardPass(
                whole.plan, whole.batch, whole.image_token, whole.is_prefill, sample_I
            )
        return self._passes[num_rows, device]
