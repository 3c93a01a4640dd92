"""LLaVA-CMoE (arXiv 2503.21227): knowledge grows where probes ask for it, and a locator picks whose routers answer.

    task t   probe     temporary experts learn a tenth of the task; where are they used?     `probing.py`, Eq. 2
             grow      new experts in those layers, copies of the most used old one          Eq. 3
             train     new experts and a new router in every layer; everything older is frozen
             locate    a model (a VAE) of what the task's prompts look like to the frozen backbone    `locating.py`
    prompt   route     the task whose model finds the prompt most familiar is t*; for the whole answer, every
                       layer's router of t* picks its top k experts per token                hierarchical routing

    p(e | h, x) = sum_t 1[t = t*(x)] softmax(R_l^(t) h)_e

A new router starts at random, with a head start for the task's own experts at its mean token: tokens that begin spread
over the whole pool mostly choose experts that cannot learn any more, and the later a task comes the less it learns.

Where no expert lives below LLM layer m (`experts.first_layer`; m = 0 where all layers may), the state that enters layer
m is the frozen model's own. With `locator.free` it is read inside the very pass that answers: layers below m, location,
plan, layers from m on.

What differs from the paper is a setting whose default `docs/methods.md` explains: experts on attention, too, or before
the LLM; a task that begins as the nearest learned one. The mixture itself is `experts/bank.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_cmoe.backbones.sites import Site, attention_sites, ffn_sites, projector_sites, vision_sites
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.per_task import RouterStart, TaskRouters
from llava_cmoe.experts.state import TaskState, restore, state_of
from llava_cmoe.experts.surgery import ExpertHost, install
from llava_cmoe.methods.base import (
    Costs,
    DeferredLocation,
    ExtraLoss,
    FitFn,
    Method,
    PlannedFit,
    StageData,
    Tensors,
    TrainingContext,
    with_report,
)
from llava_cmoe.methods.locating import TaskLocating
from llava_cmoe.methods.probing import ExpertInit, as_nearest, expected_sites, probe, with_head_start
from llava_cmoe.records import Growth, Learned, Located
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.cmoe import CmoeSettings, ExpertSettings


class Cmoe(Method):
    """Probe-guided knowledge extension and the probabilistic task locator around a frozen backbone."""

    costs = Costs(
        trained="r * (I + O) per linear of a site that grows and new expert, E D per site, and a locator",
        stored="its experts, routers and locator",
        answer="the experts that the task's routers know, and locating",
    )

    host: ExpertHost
    locates = True

    def __init__(self, settings: CmoeSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Put an empty expert bank at every site that may hold experts.

        Raises:
            RecipeError: the model has no such layer as `experts.first_layer`, or no vision to locate by.
        """
        experts = settings.experts
        self.settings, self.model, self.processor = settings, model, processor
        self.host = install(
            model,
            _sites(model, experts),
            lambda width: TaskRouters(width, experts.top_k),
            rank=experts.rank,
            alpha=experts.alpha,
            dtype=getattr(torch, experts.dtype),
        )
        self.routers = self.host.routers(TaskRouters)
        self.locating = TaskLocating(settings.locator, model, processor, self.host.context)

    @classmethod
    def refusal(cls, settings: CmoeSettings, zero_stage: int) -> str | None:
        """DeepSpeed learns in one precision: ZeRO-1 and 2 would make bfloat16 experts float32, ZeRO-3 stops (0.19)."""
        if settings.experts.dtype == "float32":
            return None
        return (
            f"DeepSpeed learns in one precision; experts are in {settings.experts.dtype}, routers in float32: choose "
            "zero_configs/ddp.yaml, or method.experts.dtype: float32"
        )

    def learn(self, data: StageData, fit: FitFn) -> Learned:
        """Learn one task: probe and grow (PGKE), train, locate (PTL)."""
        # Layer l grows where its probe's share of the top-k slots f_l,-1 > tau_l = mean(f) - alpha * std(f)     Eq. 2
        growth, init = self.probe(data, fit) if data.index else self.first_growth()
        # New experts are copies of argmax_e f_le; a new router in every layer                                  Eq. 3
        self.grow(growth, init, data.seed)
        # L = L_LM + lambda * L_aux; everything older is frozen
        report = fit(data.samples, self.training_context, label="training")
        # A model of the prompts' F_end, the frozen backbone's last-token feature
        return with_report(self.after_task(data), growth, report)

    def first_growth(self) -> tuple[Growth, Mapping[str, ExpertInit]]:
        """The first task has no pool to compare with: it gets fresh experts at every site."""
        return Growth(dict.fromkeys(self.host.banks, self.settings.experts.num_first)), {}

    def probe(self, data: StageData, fit: FitFn) -> tuple[Growth, Mapping[str, ExpertInit]]:
        """Where a task would grow, and how its new experts would begin; the pool stays as it is."""
        return probe(self.model, self.host, data, self.processor, self.settings.probe, self._training_context, fit)

    def grow(self, growth: Growth, init: Mapping[str, ExpertInit], seed: int) -> None:
        """Add trainable experts where the task grows (Eq. 3), and everywhere a router over these and old ones."""
        generator = torch.Generator().manual_seed(seed)
        for site, bank in self.host.banks.items():
            begin, num_new = init.get(site), growth.new_experts.get(site, 0)
            old = begin.known if begin else bank.ids[-(self.settings.probe.old_experts or 0) :]  # [-0:] is all
            bank.grow(
                num_new,
                generator=generator,
                init_from=begin.copied if begin else None,
                noise=self.settings.probe.clone_noise,
            )
            ids = (*old, *bank.trainable_ids)
            start = self._router_start(site, ids, begin, num_new, growth.nearest) if begin else None
            self.routers[site].add_task(ids, bank.anchor.device, generator, start)

    @contextmanager
    def training_context(self, batch: Batch) -> Iterator[ExtraLoss]:
        """Route by the latest task's routers and add the balance loss, L = L_LM + lambda * L_aux."""
        with self._training_context(self.settings.experts.balance_weight)(batch) as extra_loss:
            yield extra_loss

    def after_task(self, data: StageData) -> Learned:
        """Freeze the task's experts and routers for good, and fit its locator on the frozen model's features."""
        state, trained = state_of(self.host.banks, data.index), ledger.trained(self.host.banks)
        self.host.freeze()
        location = self.locating.learn_task(data)
        facts = {
            "trainable_parameters": trained.total.parameters,
            "router_parameters": trained.router.parameters,
            **location.facts,
        }
        tensors = {"experts": state.experts, "routers": state.routers, **location.tensors}
        return Learned(tensors, facts, location.seconds)

    def restore(self, tensors: Tensors) -> None:
        """Add the next task's experts, routers and locator as they were committed."""
        self._restore_experts(tensors)
        self.locating.restore(dict(tensors["locator"]))

    def refit(self, tensors: Tensors, data: StageData) -> Learned:
        """Add the next task's experts and routers as another run committed them, and fit a locator of this run's."""
        self._restore_experts(tensors, freeze=False)
        return self.after_task(data)

    def answering(self, batch: Batch, task_B: Tensor | None = None) -> AbstractContextManager[DeferredLocation]:
        """Each sample's task, given or located, names the routers for its whole answer."""
        return self.locating.answering(batch, task_B)

    @property
    def answers_by_task(self) -> bool:
        """A task's routers are frozen after it and choose among its own and older experts, frozen, too."""
        return self.locating.chooses_one

    def locate(self, batch: Batch) -> Located:
        """By the locators of all tasks so far."""
        return self.locating.locate(batch)

    def planned_fits(self, num_stages: int, num_grown: int | None = None) -> Iterator[PlannedFit]:
        """Probes everywhere from the second task on, then growth; the sites that grow are spread over the depth."""
        probes, sites, locator = self.settings.probe, list(self.host.banks), self.locating.planned_size()
        num_grown = expected_sites(probes, len(sites)) if num_grown is None else num_grown
        chosen = [sites[index * len(sites) // num_grown] for index in range(num_grown)]
        for stage in range(num_stages):
            growth, _ = self.first_growth()
            if stage:
                self.grow(Growth(dict.fromkeys(sites, probes.max_new_experts)), {}, seed=0)
                share = probes.fraction * (1 - probes.holdout)
                yield PlannedFit(stage, "probing", row_share=share, epochs=1, batch_size=probes.batch_size)
                self.host.discard_trainable()
                growth = Growth(dict.fromkeys(chosen, probes.max_new_experts))
            self.grow(growth, {}, seed=0)
            yield PlannedFit(stage, "training", num_sites=len(growth.new_experts), also_stored=locator)
            self.host.freeze()

    def _restore_experts(self, tensors: Tensors, freeze: bool = True) -> None:
        restore(self.host.banks, TaskState(tensors.get("experts", {}), tensors["routers"]))
        if freeze:
            self.host.freeze()

    def _router_start(
        self, site: str, ids: Sequence[int], begin: ExpertInit, num_new: int, nearest: int | None
    ) -> RouterStart:
        """From drawn rows to what a new router starts with."""
        logit = self.settings.experts.router_init_logit
        rows = {} if nearest is None else self.routers[site].rows(nearest)
        if not rows:
            return lambda drawn_ED: with_head_start(drawn_ED, num_new, begin.mean_D, logit)
        return lambda drawn_ED: as_nearest(drawn_ED, ids, rows, begin.copies_of, begin.mean_D, logit)

    def _training_context(self, balance_weight: float) -> TrainingContext:
        @contextmanager
        def context(batch: Batch) -> Iterator[ExtraLoss]:
            plan = RoutePlan.single(len(next(iter(self.routers.values()))) - 1)
            with self.host.context.use(plan, batch), self.host.context.observe() as seen:

                def balance_loss(output: ModelOutput) -> Tensor:
                    del output
                    return balance_weight * seen.balance_loss()

                yield balance_loss

        return context


def _sites(model: PreTrainedModel, experts: ExpertSettings) -> tuple[Site, ...]:
    """Where experts may live, in the order in which the model runs them."""
    kinds = {"attention": attention_sites, "ffn": ffn_sites}
    blocks = [kinds[block](model) for block in kinds if block in experts.blocks]
    num_layers = len(blocks[0])
    if experts.first_layer >= num_layers:
        raise RecipeError(
            f"method.experts.first_layer is {experts.first_layer}, but this model's LLM layers are 0 to "
            f"{num_layers - 1}; set it to one of them"
        )
    llm = [site for layer in zip(*blocks, strict=True) for site in layer if site.layer >= experts.first_layer]
    vision = vision_sites(model) if "vision" in experts.also_in else ()
    projector = projector_sites(model) if "projector" in experts.also_in else ()
    return (*vision, *projector, *llm)
