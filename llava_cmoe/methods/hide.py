"""HiDe-LLaVA (arXiv 2503.12941): hierarchical decoupling of an adapter per task.

    learn     y = W0 x + s B_t A_t x                             the task's own adapter alone, in every layer
    answer    y = W0 x + s sum_i B_i A_i x                       lower layers: what tasks have in common, summed
              y = W0 x + s sum_i d_i B_i A_i x                   the upper layers: d = softmax(similarity / T)

Similarity is that of the prompt's feature to each task's mean feature. The paper reads CLIP's image and text, here the
locator's settings name a feature of the frozen backbone.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts.routers.constant import EveryLearned
from llava_cmoe.methods.base import Costs
from llava_cmoe.methods.lora_per_task import LoraPerTask
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.hide import HideSettings


class Hide(LoraPerTask):
    """LoRA per task whose lower layers answer with every task's adapter."""

    costs = Costs(
        trained="r * (I + O) per linear",
        stored="its adapter and a mean feature",
        answer="T adapters, and locating",
    )

    answers_by_task = False  # what a lower layer adds grows with every task

    def __init__(self, settings: HideSettings, model: PreTrainedModel, processor: Processor, seed: int) -> None:
        """Make room for adapters, and let the layers below the uppermost `mixed_layers` sum them.

        Raises:
            RecipeError: the model has fewer layers than are to be mixed.
        """
        super().__init__(settings, model, processor, seed)
        num_layers = 1 + max(bank.site.layer for bank in self.host.banks.values())
        if settings.mixed_layers > num_layers:
            raise RecipeError(
                f"method.mixed_layers is {settings.mixed_layers}, but this model's LLM has {num_layers} layers; set it "
                f"to 0 to {num_layers}"
            )
        for site, bank in self.host.banks.items():
            if bank.site.layer < num_layers - settings.mixed_layers:
                bank.router = self.routers[site] = EveryLearned().train(bank.training)
