"""LLaVA-CMoE (arXiv 2503.21227): knowledge grows where probes ask for it, and a locator picks whose routers answer.

    task t   probe     temporary experts learn a tenth of the task; where are they used?     `probing.py`, Eq. 2
             grow      new experts in those layers, copies of the most used old one          Eq. 3
             train     new experts and a new router in every layer; everything older is frozen
             locate    a VAE learns what the task's prompts look like to the frozen model    `locators/vae.py`
    prompt   route     the VAE that finds the prompt most familiar names the task t*; for the whole answer, every
                       layer's router of t* picks its top k experts per token                hierarchical routing

    p(e | h, x) = sum_t 1[t = t*(x)] softmax(R_l^(t) h)_e

A new router starts at random, with a head start for the task's own experts at its mean token: tokens that begin spread
over the whole pool mostly choose experts that cannot learn any more, and the later a task comes the less it learns.

Where no expert lives below LLM layer m (`experts.first_layer`), the state that enters layer m is the frozen model's
own. With `locator.free` it is read inside the very pass that answers: layers below m, verdict, plan, layers from m on.

What differs from the paper is marked as a choice in the settings. Experts live in the LLM's FFNs and, with
`experts.also_in`, in the vision encoder's and the projector; the mixture itself is `experts/bank.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from math import ceil

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, pad_across_processes
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from llava_cmoe.backbones.feature_store import FeatureStore
from llava_cmoe.backbones.features import feature_in_passing, prompt_feature
from llava_cmoe.backbones.sites import Site, ffn_sites, image_token_of, projector_sites, vision_sites
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import Processor, tokenizer_of
from llava_cmoe.data.encoding import PromptRows
from llava_cmoe.experts import ledger
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.state import TaskState, restore, state_of
from llava_cmoe.experts.surgery import install
from llava_cmoe.locators import LOCATORS
from llava_cmoe.methods.base import Batch, ExtraLoss, LateVerdict, Learning, Method, StageData, Teach, Tensors
from llava_cmoe.methods.probing import Start, probe
from llava_cmoe.records import Growth, Learned, Located, Mixture
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.cmoe import CmoeSettings, ExpertSettings

FEATURE_BATCH = 64
"""Prompts per forward pass when a task's features are read for its locator."""


class Cmoe(Method):
    """Probe-guided knowledge extension and the probabilistic task locator around a frozen backbone."""

    def __init__(self, settings: CmoeSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Put an empty expert bank at every site that may hold experts.

        Raises:
            RecipeError: the model has no such layer as `experts.first_layer`, or no vision to locate by.
        """
        if settings.locator.feature == "vision" and image_token_of(model) is None:
            raise RecipeError(
                f"method.locator.feature is vision, but a {model.config.model_type} reads text alone; set it to last, "
                "mean or text"
            )
        experts = settings.experts
        self.settings, self.model, self.processor = settings, model, processor
        self.host = install(
            model,
            _sites(model, experts),
            rank=experts.rank,
            alpha=experts.alpha,
            top_k=experts.top_k,
            dtype=getattr(torch, experts.dtype),
        )
        self.locator = LOCATORS[settings.locator.kind](settings.locator, device=model.device)

    def before_task(self, data: StageData, teach: Teach) -> Growth:
        """Probe (from the second task on), then add experts where the probes were used and a router everywhere."""
        generator = torch.Generator().manual_seed(data.seed)
        if data.index == 0:
            growth = Growth(dict.fromkeys(self.host.banks, self.settings.experts.num_first))
            starts: Mapping[str, Start] = {}
        else:
            growth, starts = self.probe(data, teach)
        for site, bank in self.host.banks.items():
            start = starts.get(site)
            bank.grow(
                growth.new_experts.get(site, 0),
                generator=generator,
                init_from=start.copied if start else None,
                noise=self.settings.probe.clone_noise,
            )
            bank.add_router(generator=generator, lead_D=self._lead(start) if start else None)
        return growth

    def probe(self, data: StageData, teach: Teach) -> tuple[Growth, Mapping[str, Start]]:
        """Where a task would grow, and how its new experts would begin; the pool stays as it is."""
        return probe(self.model, self.host, data, self._collator(), self.settings.probe, self._learning, teach)

    @contextmanager
    def learning(self, batch: Batch) -> Iterator[ExtraLoss]:
        """Route by the newest task's routers and add the balance loss, L = L_LM + lambda * L_aux."""
        with self._learning(self.settings.experts.balance_weight)(batch) as extra_loss:
            yield extra_loss

    def after_task(self, data: StageData, growth: Growth) -> Learned:
        """Freeze the task's experts and routers for good, and fit its locator on the frozen model's features."""
        self.host.freeze()
        fitted = self.locator.fit(self.features(data.prompts, data.features), data.seed)
        # The one that is committed locates in all processes: fits on several GPUs may differ in their last bits.
        (location,) = broadcast_object_list([{name: tensor.cpu() for name, tensor in fitted.items()}])
        self.locator.add(location)
        state = state_of(self.host.banks, data.index)
        added = ledger.added(self.host.banks, data.index)
        facts = {
            "trainable_parameters": added.total.parameters,
            "locator_parameters": ledger.size_of(location.values()).parameters,
            "router_parameters": added.router.parameters,
        }
        return Learned({"experts": state.experts, "routers": state.routers, "locator": location}, facts)

    def restore(self, tensors: Tensors) -> None:
        """Add the next task's experts, routers and locator as they were committed."""
        self._restore(tensors)
        self.locator.add(tensors["locator"])

    def take_over(self, tensors: Tensors, data: StageData) -> Learned:
        """Add the next task's experts and routers as another run committed them, and fit a locator of this run's."""
        self._restore(tensors)
        return self.after_task(data, Growth({}))

    def locate(self, batch: Batch) -> Located:
        """The task whose VAE (or other model) finds each prompt most familiar; per sample, once per prompt."""
        with self.host.context.use(None):
            return self.locator.locate(self._feature(batch))

    def routed(self, choice: Tensor | Mixture | None) -> AbstractContextManager[None]:
        """Each sample's task, or mixture of tasks, names the routers for its whole answer."""
        return self.host.context.use(_plan(choice))

    @contextmanager
    def locating(self, batch: Batch) -> Iterator[LateVerdict]:
        """Locate in a pass before, or, with `locator.free`, inside the prefill."""
        passing = self.settings.locator.free
        with self._locating_in_passing(batch) if passing else super().locating(batch) as verdict:
            yield verdict

    def features(self, prompts: PromptRows, store: FeatureStore | None = None) -> Tensor:
        """The feature of every prompt (S, D), F_end unless the settings say otherwise; no experts active."""
        if store is None:
            return self._read(prompts)
        locator = self.settings.locator
        read_as = {"feature": locator.feature, "layer": locator.layer, "batch": FEATURE_BATCH}
        return store.features(prompts, read_as, lambda: self._read(prompts)).to(self.model.device)

    def _read(self, prompts: PromptRows) -> Tensor:
        """Each process reads every so many batches in a row; all get all of it (S, D), as one alone would read it."""
        state, num_prompts = PartialState(), len(prompts)
        share = FEATURE_BATCH * ceil(num_prompts / (FEATURE_BATCH * state.num_processes))
        mine = range(num_prompts)[share * state.process_index :][:share] or range(1)  # a row that is cut off again
        loader = DataLoader(Subset(prompts, mine), batch_size=FEATURE_BATCH, collate_fn=self._collator())
        with self.host.context.use(None):
            own_SD = torch.cat([self._feature(self._on_device(batch)) for batch in loader])
        whole_SD: Tensor = gather(pad_across_processes(own_SD))
        return whole_SD[:num_prompts]

    @contextmanager
    def _locating_in_passing(self, batch: Batch) -> Iterator[LateVerdict]:
        """The first forward pass inside starts without experts and goes on, from the locator's layer, with a plan."""
        found: list[Located] = []

        def locate(feature_BD: Tensor) -> None:
            located = self.locator.locate(feature_BD)
            self.host.context.turn_to(_plan(located.choice))
            found.append(located)

        def verdict() -> Located:
            if not found:
                raise ValueError("nothing is located yet; let the model read the prompts first")
            return found[0]

        settings = self.settings.locator
        reading = feature_in_passing(self.model, batch, settings.layer, settings.feature, locate)
        with self.host.context.use(None), reading:
            yield verdict

    def _restore(self, tensors: Tensors) -> None:
        restore(self.host.banks, TaskState(tensors.get("experts", {}), tensors["routers"]))
        self.host.freeze()

    def _lead(self, start: Start) -> Tensor:
        """What new experts' rows of a router start with, (D,): the mean token's logit is then `experts.head_start`."""
        return self.settings.experts.head_start * start.mean_D / start.mean_D.square().sum()

    def _feature(self, batch: Batch) -> Tensor:
        return prompt_feature(self.model, batch, self.settings.locator.layer, self.settings.locator.feature)

    def _learning(self, balance_weight: float) -> Learning:
        @contextmanager
        def learning(batch: Batch) -> Iterator[ExtraLoss]:
            newest = len(next(iter(self.host.banks.values())).routers) - 1
            plan = RoutePlan.single(newest, batch["attention_mask"].bool())
            with self.host.context.use(plan), self.host.context.observe() as seen:
                yield lambda: balance_weight * seen.balance_loss()

        return learning

    def _collator(self) -> Collator:
        return Collator(tokenizer_of(self.processor).pad_token_id)

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}


def _sites(model: PreTrainedModel, experts: ExpertSettings) -> tuple[Site, ...]:
    """Where experts may live, in the order in which the model runs them."""
    llm = ffn_sites(model)
    if experts.first_layer >= len(llm):
        raise RecipeError(
            f"method.experts.first_layer is {experts.first_layer}, but this model's LLM layers are 0 to "
            f"{len(llm) - 1}; set it to one of them"
        )
    vision = vision_sites(model) if "vision" in experts.also_in else ()
    projector = projector_sites(model) if "projector" in experts.also_in else ()
    return (*vision, *projector, *llm[experts.first_layer :])


def _plan(choice: Tensor | Mixture | None) -> RoutePlan | None:
    match choice:
        case None:
            return None
        case Mixture():
            return RoutePlan.soft(choice)
        case _:
            return RoutePlan.hard(choice)
