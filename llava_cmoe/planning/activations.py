"""What a forward pass keeps for backward, in bytes: the real model runs on tensors that have shapes and no memory.

So every architecture, method and precision is counted by its own code. Counted are the tensors that autograd saves,
each once, without parameters. A method's own loss terms come on top, and what an operation needs only while it runs, at
most some copies of the logits in float32; kernels of a GPU may save a little more or less than a CPU's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_cmoe.data.collator import ROW
from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.methods.base import Method
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.training import TrainingSettings


@dataclass(frozen=True)
class Activations:
    """Bytes kept for backward.

    Attributes:
        kept: with everything kept.
        checkpointed: with gradient checkpointing: what enters each layer, what lies outside of layers, and one layer's
            own, which is computed again while it goes backward.
    """

    kept: int
    checkpointed: int


class Saved:
    """Counts what autograd saves while a model runs, each tensor's memory once, by the layer that saved it first.

    Layers are those that gradient checkpointing would run again. What is counted is held on to, as autograd does:
    memory that is freed would come back under the same address.
    """

    def __init__(self, model: nn.Module) -> None:
        """Parameters and buffers of `model` are left out."""
        self.outside, self.layers, self.entering = 0, dict[str, int](), dict[str, int]()
        self._model, self._layer = model, ""
        self._held = {_address(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}

    def __enter__(self) -> Saved:
        """Begin to count."""
        self._hooks: list[Any] = []
        for name, layer in self._model.named_modules():
            if isinstance(layer, GradientCheckpointingLayer):
                self._hooks.append(layer.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
                self._hooks.append(layer.register_forward_hook(self._leave))
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._saving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Count no more."""
        self._saving.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def read(self) -> Activations:
        """The sums."""
        busy = [name for name, kept in self.layers.items() if kept]
        again = max((self.layers[name] for name in busy), default=0)
        entering = sum(min(self.entering[name], self.layers[name]) for name in busy)
        return Activations(self.outside + sum(self.layers.values()), self.outside + entering + again)

    def _enter(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        self._layer = name
        self.layers[name], self.entering[name] = 0, hidden_BTD.untyped_storage().nbytes()

    def _leave(self, *_: Any) -> None:
        self._layer = ""

    def _pack(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in self._held:
            self._held[address] = tensor
            size = tensor.untyped_storage().nbytes()
            if self._layer:
                self.layers[self._layer] += size
            else:
                self.outside += size
        return tensor


def activations(method: Method, settings: TrainingSettings, length: int) -> Activations:
    """What one batch of whole samples keeps, one picture each.

    Args:
        method: as `growth_schedule.py` makes and grows it; its meta model is used up.
        settings: batch size and precision.
        length: tokens of every sample, those of its picture among them.

    Raises:
        RecipeError: a length that holds no picture where experts learn to read one.
    """
    model, batch_size = method.model, settings.batch_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        mask_BT = torch.ones(batch_size, length, dtype=torch.long)
        labels_BT = torch.zeros(batch_size, length, dtype=torch.long)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16")
        batch = {"attention_mask": mask_BT, "labels": labels_BT, ROW: torch.arange(batch_size)}
        with Saved(model) as saved, autocast, method.training_context(batch):
            embedded_BTD = _embedded(model, batch_size, length)
            _ = model(inputs_embeds=embedded_BTD, labels=labels_BT, use_cache=False).loss
    return saved.read()


def _embedded(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    """What enters the LLM; pictures are read only where experts learn to, as a frozen encoder keeps nothing.

    Token ids, which have no values here, would state where image features belong among the text's; the features come
    first.
    """
    image_banks = [one for one in model.modules() if isinstance(one, ExpertBank) and one.site.of_images]
    width, dtype = model.config.get_text_config().hidden_size, model.dtype
    if not image_banks:
        return torch.empty(batch_size, length, width, dtype=dtype)
    vision = model.config.vision_config
    pixels_BCHW = torch.empty(batch_size, 3, vision.image_size, vision.image_size, dtype=dtype)
    image_banks[0].context.begin_pass(is_prefill=True, sample_of=torch.arange)
    encode: Any = model.get_image_features
    image_BID = torch.stack(list(encode(pixel_values=pixels_BCHW).pooler_output))
    if length < image_BID.shape[1]:
        raise RecipeError(
            f"{length} tokens are too few for a picture, which takes {image_BID.shape[1]}; raise --length"
        )
    text_BTD = torch.empty(batch_size, length - image_BID.shape[1], width, dtype=dtype)
    return torch.cat([image_BID.to(dtype), text_BTD], dim=1)


def _address(tensor: Tensor) -> int:
    """What tells two tensors' memory apart, views of the same memory not: a tensor without memory has no pointer."""
    return int(tensor.untyped_storage()._cdata)
