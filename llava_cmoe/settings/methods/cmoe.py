"""Settings of `cmoe`: experts and routers, probes, the task locator."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from llava_cmoe.settings.base import Settings
from llava_cmoe.settings.locators import LocatorSettings


class ExpertSettings(Settings):
    """LoRA experts and their routers (y = W0 x + sum_e gate_e * alpha/rank * B_e A_e x)."""

    renamed: ClassVar = {"head_start": "router_init_logit"}

    rank: int = Field(64, gt=0)
    """LoRA rank of one expert."""
    alpha: float = Field(128.0, gt=0)
    """LoRA scale: an expert's output is multiplied by alpha / rank."""
    first_layer: int = Field(0, ge=0)
    """Lowest LLM layer, from 0, that may hold experts; says nothing of `also_in`."""
    blocks: tuple[Literal["attention", "ffn"], ...] = Field(("ffn",), min_length=1)
    """Blocks of an LLM layer that may hold experts; each is a site, with a gate that its linears share."""
    also_in: tuple[Literal["vision", "projector"], ...] = ()
    """Where experts may live besides the LLM: in the vision encoder's FFNs, in the projector; probed like any layer."""
    num_first: int = Field(2, gt=0)
    """Experts per site for the first task (it has no pool and is not probed)."""
    top_k: int = Field(2, gt=0)
    """Experts a token uses at a site; fewer where fewer exist."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision experts are held and learned in; routers keep float32. bfloat16 halves their memory, and loses updates
    below 1/256 of a weight, as small learning rates make them."""
    router_init_logit: float = Field(6.0, ge=0)
    """Logit by which a new router starts in favour of the task's own experts, at the task's mean token. With 0 its
    tokens begin spread over the whole pool, of which ever less can learn: the later a task comes, the worse."""
    balance_weight: float = Field(0.01, ge=0)
    """Weight of the balance loss n * sum_e F_e P_e, averaged over sites."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        for key, places in (("also_in", self.also_in), ("blocks", self.blocks)):
            if len(set(places)) < len(places):
                raise ValueError(f"{key} names a place twice: {', '.join(places)}; name each once")
        return self


class ProbeSettings(Settings):
    """Probe-guided knowledge extension: where does the new task need experts?"""

    former: ClassVar = {"router": "random"}

    fraction: float = Field(0.1, gt=0, le=1)
    """Share of the task's training rows that probing reads."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of those rows kept for counting; the others train the probes."""
    alpha: float = Field(0.25, ge=0)
    """Threshold tau = mean - alpha * std of activation frequencies (Eq. 2); larger grows more layers."""
    floor: float = Field(0.0, ge=0)
    """Least threshold, in units of chance: a token that chooses at random gives each of n experts 1 / n of its slots.
    At 0 a layer whose probe no token used never grows, however far one frequency stands out; at 1 none grows whose
    probe is used less than chance, and with `scope: layer`, whose mean is chance, alpha has no effect."""
    scope: Literal["layer", "global", "need", "all", "none", "random"] = "layer"
    """Mean and std over the experts of one layer, or over the layers' probe frequencies, each times the layer's number
    of experts, as pools differ in size. With `need` a task that no learned one is `near` grows in all layers; a near
    one in the fewer, those whose probes are used most, the less the nearest task's experts leave of the base model's
    loss on the probing rows. As controls of what probes are good for, a threshold that all layers pass, or none does,
    or as many layers as `global` chooses, drawn at random."""
    max_new_experts: int = Field(1, gt=0)
    """Experts added to a chosen layer."""
    init: Literal["most_used", "nearest_task", "probe", "lora"] = "most_used"
    """Start of the new experts: copies of the one most used while probing (Eq. 3); copies of those that the nearest
    learned task uses most for the new task's rows, each of another one; the probes themselves; or fresh LoRA. With
    `nearest_task` the new routers are that task's, too, so that learning begins with all that it can do; where no task
    is `near`, with fresh LoRA."""
    near: float = Field(0.5, gt=0, le=1)
    """Largest share of the base model's loss on the probing rows that the nearest task may leave to be near; with
    `scope: need` the share from which on a task grows in all layers."""
    old_experts: int | None = Field(None, gt=0)
    """Old experts that a task's routers know at a site: those that its probes use most or, for a task that another is
    `near`, that one. What a task learns, stores and computes then does not grow with the tasks before it; all when
    absent."""
    clone_noise: float = Field(0.0, ge=0)
    """Gaussian noise on a copied expert, in standard deviations of each of its matrices."""
    counted: Literal["all", "answer"] = "all"
    """Tokens whose experts are counted: all that are not padding, or those of the answers."""
    balance_weight: float = Field(0.01, ge=0)
    """Weight of the balance loss while probing; 0 shows how much of the probes' use it causes."""
    router: Literal["copied", "random"] = "copied"
    """Start of a probe router's rows for the pool's experts: those of the last task's router, or drawn. Drawn rows make
    the layers chosen and the expert copied a matter of the seed; the probe's own row is always drawn."""
    learning_rate: float | None = Field(None, gt=0)
    """Learning rate while probing; the training stage's when absent."""
    batch_size: int | None = Field(None, gt=0)
    """Samples per step and process while probing, before accumulation; the training stage's when absent."""


class CmoeSettings(Settings):
    """LLaVA-CMoE: probe-guided growth of FFN experts, routers per task, a probabilistic task locator."""

    name: Literal["cmoe"] = "cmoe"
    experts: ExpertSettings = ExpertSettings()
    """Experts and routers."""
    probe: ProbeSettings = ProbeSettings()
    """Where to grow."""
    locator: LocatorSettings = LocatorSettings()
    """Which task an input belongs to."""

    @model_validator(mode="after")
    def _located_below_experts(self) -> Self:
        layer, first = self.locator.layer, self.experts.first_layer
        if self.locator.free and not 0 <= layer <= first:
            raise ValueError(
                f"locator.free needs a state that no expert has touched, and locator.layer is {layer} where "
                f"experts.first_layer is {first}; set locator.layer to 0 to {first}, or locator.free: false"
            )
        if self.locator.free and self.experts.also_in:
            raise ValueError(
                "locator.free finds the plan in a state of the LLM; experts in the vision encoder or the projector "
                "need it before, and with them that state is no longer the frozen model's; leave experts.also_in "
                "empty, or set locator.free: false"
            )
        return self
