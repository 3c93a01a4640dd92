"""MoELoRA as CoIN has it: a fixed pool of small experts in every linear, mixed by a dense softmax per token.

All tasks share experts and routers and go on training them, so nothing is frozen and nothing is located. The total rank
is split over the experts, as in CoIN's code (rank 128 over 8 experts is 16 each).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_cmoe.backbones.sites import linear_sites
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.dense import DenseRouter
from llava_cmoe.experts.state import TaskState, restore, state_of
from llava_cmoe.experts.surgery import ExpertHost, install
from llava_cmoe.methods.base import Costs, DeferredLocation, ExtraLoss, Method, StageData, Tensors, no_extra_loss
from llava_cmoe.records import Learned
from llava_cmoe.settings.methods.moelora import MoeLoraSettings


class MoeLora(Method):
    """Shared experts and one shared router per linear, index 0 for every task."""

    costs = Costs(
        trained="r * (I + O) per linear, and E I for its gate",
        stored="all experts and gates",
        answer="all experts, of r in all",
    )

    host: ExpertHost

    def __init__(self, settings: MoeLoraSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Put all experts beside every linear of the LLM's attention and FFNs."""
        self.model, self.processor = model, processor
        rank = settings.rank // settings.num_experts
        # The scale stays alpha / total rank.
        self.host = install(
            model,
            linear_sites(model),
            DenseRouter,
            rank=rank,
            alpha=settings.alpha * rank / settings.rank,
        )
        generator, routers = torch.Generator().manual_seed(seed), self.host.routers(DenseRouter)
        for site, bank in self.host.banks.items():
            bank.grow(settings.num_experts, generator=generator)
            routers[site].add_task(bank.ids, bank.anchor.device, generator)

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """The shared router for every sample; no balance term, as in CoIN."""
        with self.answering(batch):
            yield no_extra_loss

    def after_task(self, data: StageData) -> Learned:
        """All experts and routers as they are now: the next task changes all of them."""
        state = state_of(self.host.banks, 0)
        parameters = ledger.trainable(self.model).parameters
        return Learned({"experts": state.experts, "routers": state.routers}, {"trainable_parameters": parameters})

    def restore(self, tensors: Tensors) -> None:
        """Replace experts and routers by those of the next task."""
        self.host.discard_trainable()
        restore(self.host.banks, TaskState(tensors["experts"], tensors["routers"]))

    @contextmanager
    def answering(self, batch: Batch, task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        """The one shared router, whatever the task."""
        del task_B
        with self.host.context.use(RoutePlan.single(0), batch):
            yield lambda: None
