"""Patch-level routing (pMoE, arXiv 2306.04073) in a language model: a task's experts choose patches of the picture.

    y_j = W0 x_j + sum_e gate_je * s B_e A_e x_j        gate_je: not zero for the patches that expert e chose

Every task adds its experts to every FFN of the LLM and a router that scores patches by what is asked; both are frozen
after it, so nothing moves what an old expert chooses. An expert would choose patches of any picture: a locator says
whose experts take part at all. How experts choose is `routers/expert_choice.py`'s.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from llava_cmoe.backbones.sites import ffn_sites, image_token_of
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts.routers.expert_choice import ExpertChoice
from llava_cmoe.experts.surgery import ExpertHost, install
from llava_cmoe.methods.base import Costs
from llava_cmoe.methods.locating import TaskLocating
from llava_cmoe.methods.lora_per_task import LoraPerTask
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.patch_routing import PatchRoutingSettings


class PatchRouting(LoraPerTask):
    """Experts per task, as LoRA per task has them, that take part in the patches they chose alone."""

    costs = Costs(
        trained="r * (I + O) per FFN linear and new expert, keys and conditions per FFN, and a locator",
        stored="its experts, keys and locator",
        answer="its experts on the picture's tokens, and locating",
    )

    host: ExpertHost

    def __init__(self, settings: PatchRoutingSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Make room for experts in every FFN of the LLM.

        Raises:
            RecipeError: the model reads text alone.
        """
        del seed
        if image_token_of(model) is None:
            raise RecipeError(f"patch_routing chooses patches, but a {model.config.model_type} reads text alone")
        self.model, self.processor, self.num_new = model, processor, settings.num_new
        self.host = install(
            model,
            ffn_sites(model),
            lambda width: ExpertChoice(width, settings.num_new, settings.capacity, settings.condition_rank),
            rank=settings.rank,
            alpha=settings.alpha,
        )
        self.routers = self.host.routers(ExpertChoice)
        self.locating = TaskLocating(settings.locator, model, processor, self.host.context)

    def grow(self, seed: int) -> None:
        """Experts as LoRA begins, and a router that does not look at what is asked yet."""
        generator = torch.Generator().manual_seed(seed)
        for site, router in self.host.routers(ExpertChoice).items():
            bank = self.host.banks[site]
            bank.grow(self.num_new, generator=generator)
            router.add_task(bank.anchor.device, generator)
