"""Sequential fine-tuning: one stock PEFT LoRA adapter on all linears of the LLM, trained on task after task.

The baseline that forgets: nothing protects what an earlier task taught.
"""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, set_seed

from llava_cmoe.backbones.sites import linear_sites
from llava_cmoe.data.conversation import Processor
from llava_cmoe.experts import ledger
from llava_cmoe.methods.base import Costs, Method, StageData, Tensors
from llava_cmoe.records import Learned
from llava_cmoe.settings.methods.sequential_lora import SequentialLoraSettings


class SequentialLora(Method):
    """One adapter that every task trains on."""

    costs = Costs(
        trained="r * (I + O) per linear",
        stored="the adapter",
        answer="one adapter",
    )

    model: PeftModel  # type: ignore[assignment]  # stands where the backbone stood, and generates as it does

    def __init__(
        self, settings: SequentialLoraSettings, model: PreTrainedModel, processor: Processor, seed: int
    ) -> None:
        """Put an adapter beside every linear of the LLM's attention and FFNs."""
        targets = [site.name for site in linear_sites(model)]
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT annotates int and divides
            lora_dropout=settings.dropout,
            target_modules=targets,
        )
        set_seed(seed)  # PEFT draws A from the global source
        self.model, self.processor = get_peft_model(model, config), processor

    def after_task(self, data: StageData) -> Learned:
        """The whole adapter as it is now: the next task changes all of it."""
        adapter = {
            name: value.detach().to("cpu", copy=True) for name, value in get_peft_model_state_dict(self.model).items()
        }
        return Learned({"adapter": adapter}, {"trainable_parameters": ledger.trainable(self.model).parameters})

    def restore(self, tensors: Tensors) -> None:
        """Replace the adapter by the one of the next task."""
        set_peft_model_state_dict(self.model, dict(tensors["adapter"]))
