"""LoRA adapters in stock PEFT: a matrix pair per linear of the bare backbone, whatever made it.

Shape letters: I and O input and output width of a linear, F rank of the adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from llava_cmoe.experts.surgery import uninstall


@dataclass(frozen=True)
class Adapter:
    """LoRA matrices of one linear, the scale in them: a (F, I) and b (O, F)."""

    a_FI: Tensor
    b_OF: Tensor


def on_bare_backbone(model: PreTrainedModel, adapters: Mapping[str, Adapter]) -> PeftModel:
    """Take the banks out of a model and put stock LoRA layers with these adapters, by module path, in their place."""
    uninstall(model)
    ranks = {name: len(adapter.a_FI) for name, adapter in adapters.items()}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    others = {name: other for name, other in ranks.items() if other != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of 1
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        init_lora_weights=False,
    )
    peft_model = get_peft_model(model, config)
    loaded: Any = set_peft_model_state_dict(
        peft_model,
        {
            f"base_model.model.{name}.lora_{half}.weight": tensor
            for name, adapter in adapters.items()
            for half, tensor in (("A", adapter.a_FI), ("B", adapter.b_OF))
        },
    )
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    return peft_model.eval()
