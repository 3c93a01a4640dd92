"""Tells a route context, whenever the model reads pictures, which sample of the batch each of them belongs to.

Needed where banks sit before the LLM: there a row of the batch is an image, a text-only sample has none, another may
have several, and a plan is per sample. What the context does with it is `plan.py`.
Shape letters: B batch, T tokens, I images of the batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_cmoe.experts.plan import RouteContext


def follow_images(model: PreTrainedModel, context: RouteContext) -> None:
    """From now on, each forward pass that is given pixels tells `context` whose they are; steps of decoding are not."""
    tell = partial(_tell, context, int(model.config.image_token_id))
    context.image_hook = model.base_model.register_forward_pre_hook(tell, with_kwargs=True)
    # Of a model that reads images `generate` calls the encoder first and on its own, where nothing says whose they are.
    model.input_modalities = ["text"]


def unfollow_images(model: PreTrainedModel, context: RouteContext) -> None:
    """Leave the model as it was before `follow_images`; does nothing where nobody follows."""
    if context.image_hook is not None:
        context.image_hook.remove()
        context.image_hook = None
        del model.input_modalities  # the class's own shows again


def samples_of_images(placeholder_BT: Tensor, num_images: int) -> Tensor:
    """Sample of each image (I,), from the prompts' image tokens (B, T): equally many per image, in the images' order.

    Reads shapes alone on the host: no sync.
    """
    end_B = placeholder_BT.sum(dim=1).cumsum(dim=0)
    first_I = torch.arange(num_images, device=end_B.device) * end_B[-1] // num_images
    return torch.searchsorted(end_B, first_I, right=True)


def _tell(context: RouteContext, image_token: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    input_ids, pixel_values = kwargs.get("input_ids"), kwargs.get("pixel_values")
    if input_ids is not None and pixel_values is not None:
        context.read_images(samples_of_images(input_ids == image_token, len(pixel_values)))
