"""CaRE, continual routing by bi-level experts (BR-MoE): the surest tasks' routers give their best experts.

    learn    an expert, a router and a perceptron in every FFN; the perceptron tells the task's pseudo-classes apart
    L        = L_LM + lambda * mean over layers of CE(C_t c, class) + KL(deepest layer's perceptron || this one's)
    answer   in every layer: the routers of the M tasks whose perceptrons are surest of the prompt, of each its K best
             experts, and an expert that all tasks share                           `routers/bi_level.py`
    shared   goes on learning in every task, and keeps momentum * what it was before

A generative task has no classes: its pseudo-classes are the clusters (k-means) of its prompts' frozen features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_cmoe.backbones.sites import ffn_sites
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.bi_level import BiLevelRouter
from llava_cmoe.experts.stack import LoraPair
from llava_cmoe.experts.state import TaskState, restore, state_of
from llava_cmoe.experts.surgery import ExpertHost, install
from llava_cmoe.methods.base import Costs, DeferredLocation, ExtraLoss, FitFn, Method, PlannedFit, StageData, Tensors
from llava_cmoe.methods.frozen_features import FrozenFeatures, normalised
from llava_cmoe.records import Growth, Learned
from llava_cmoe.settings.methods.care import CareSettings

SHARED = 0
"""Id of the shared expert; task t's own is t + 1."""


class Care(Method):
    """A triplet per task and FFN, and one shared expert per FFN."""

    costs = Costs(
        trained="2 r * (I + O) per FFN linear, and (classes + T) D per FFN",
        stored="its expert, router and perceptron, the shared expert",
        answer="T + 1 experts of each FFN",
    )

    host: ExpertHost

    def __init__(self, settings: CareSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Make room for experts in every FFN of the LLM."""
        del seed
        self.settings, self.model, self.processor = settings, model, processor
        self.host = install(
            model,
            ffn_sites(model),
            lambda width: BiLevelRouter(width, settings.num_classes, settings.num_routers, settings.num_experts),
            rank=settings.rank,
            alpha=settings.alpha,
        )
        self.routers = self.host.routers(BiLevelRouter)
        self.features = FrozenFeatures(model, processor, self.host.context, settings.layer, settings.feature)
        self._class_of_row_S = torch.empty(0, dtype=torch.long)
        self._shared_before: dict[str, dict[str, LoraPair]] = {}

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """An own expert everywhere for every task; the shared one learns in each."""
        del num_grown
        for stage in range(num_stages):
            self.grow(stage, seed=0)
            yield PlannedFit(stage, "training", num_sites=len(self.host.banks))
            self._freeze(stage)

    def before_task(self, data: StageData, fit: FitFn) -> Growth:
        """Cluster the task's prompts, and add its triplets."""
        del fit
        feature_SD = self.features.of_rows(data.prompts, data.features)
        generator = torch.Generator().manual_seed(data.seed)
        self._class_of_row_S = clusters(normalised(feature_SD), self.settings.num_classes, generator)
        self._shared_before = {site: bank.expert(SHARED) for site, bank in self.host.banks.items() if data.index}
        self.grow(data.index, data.seed)
        return Growth(dict.fromkeys(self.host.banks, 1 if data.index else 2))

    def grow(self, task: int, seed: int) -> None:
        """The task's expert, router and perceptron; the shared expert with the first task."""
        generator = torch.Generator().manual_seed(seed)
        for site, bank in self.host.banks.items():
            bank.grow(1 if task else 2, generator=generator, first=task + 1 if task else SHARED)
            self.routers[site].add_task(bank.anchor.device, generator)

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """Route by the newest task's router and the surest other ones, and teach the perceptrons."""
        plan = RoutePlan.single(0)

        def class_loss(output: ModelOutput) -> Tensor | float:
            del output
            real_B = batch[ROW] >= 0  # a sample that only fills up a batch is of no class
            class_B = self._class_of_row_S.to(real_B.device)[batch[ROW]][real_B]
            logits = [plan.decided[router.logits_key][real_B] for router in self.routers.values()]
            return self.settings.class_weight * perceptron_loss(logits, class_B)

        with self.host.context.use(plan, batch):
            yield class_loss

    @torch.no_grad()
    def after_task(self, data: StageData) -> Learned:
        """Draw the shared expert back to what it was, and freeze the task's own triplets for good."""
        trained = ledger.trained(self.host.banks)
        for site, before in self._shared_before.items():
            for linear, stack in self.host.banks[site].stacks.items():
                block, pair = stack.trainable, before[linear]
                assert block is not None and block.ids[0] == SHARED, "the shared expert learns in every task"
                block.A[0].lerp_(pair.a_ERI[0], self.settings.momentum)
                block.B[0].lerp_(pair.b_EOR[0].mT, self.settings.momentum)
        state = state_of(self.host.banks, data.index)
        self._freeze(data.index)
        facts = {"trainable_parameters": trained.total.parameters, "router_parameters": trained.router.parameters}
        return Learned({"experts": state.experts, "routers": state.routers}, facts)

    def restore(self, tensors: Tensors) -> None:
        """Replace the shared expert, and add the next task's triplets."""
        for bank in self.host.banks.values():
            bank.discard_trainable()
        restore(self.host.banks, TaskState(tensors["experts"], tensors["routers"]))
        self._freeze(next(iter(self.routers.values())).num_tasks - 1)

    @contextmanager
    def answering(self, batch: Batch, task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        """Every layer chooses for itself, whatever the task."""
        del task_B
        with self.host.context.use(RoutePlan.single(0), batch):
            yield lambda: None

    def _freeze(self, task: int) -> None:
        for bank in self.host.banks.values():
            bank.freeze([task + 1])


def perceptron_loss(logits: list[Tensor], class_B: Tensor) -> Tensor:
    """Mean over layers of CE(logits, class) + KL(the last layer's softmax || softmax).

    The last layer teaches the others and is not taught by them.

    Args:
        logits: (B, C) of each layer, from the lowest on.
        class_B: what they should say.
    """
    deepest_BC = logits[-1].detach().log_softmax(dim=1)
    terms = [
        F.cross_entropy(logits_BC, class_B)
        + F.kl_div(logits_BC.log_softmax(dim=1), deepest_BC, reduction="batchmean", log_target=True)
        for logits_BC in logits
    ]
    return torch.stack(terms).mean()


def clusters(x_SD: Tensor, num: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Cluster of each row (S,), by k-means from rows drawn far apart; at most `num`, fewer where rows are fewer.

    On the CPU in float64: every process finds the same.
    """
    x_SD = x_SD.cpu().double()
    centre_KD = x_SD[torch.randint(len(x_SD), (1,), generator=generator)]
    for _ in range(min(num, len(x_SD)) - 1):
        away_S = torch.cdist(x_SD, centre_KD).amin(dim=1).square() + torch.finfo(torch.float64).tiny
        centre_KD = torch.cat([centre_KD, x_SD[torch.multinomial(away_S, 1, generator=generator)]])
    for _ in range(rounds):
        nearest_S = torch.cdist(x_SD, centre_KD).argmin(dim=1)
        member_KS = F.one_hot(nearest_S, len(centre_KD)).double().mT
        size_K1 = member_KS.sum(dim=1, keepdim=True)
        centre_KD = torch.where(size_K1 > 0, member_KS @ x_SD / size_K1.clamp_min(1), centre_KD)
    return torch.cdist(x_SD, centre_KD).argmin(dim=1)
