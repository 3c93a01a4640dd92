"""Tells a route context, whenever the model reads pictures, which sample of the batch each row of them belongs to.

Needed where banks sit before the LLM: there a row is an image, a crop or a patch of one, a text-only sample has none,
another may have several, and a plan is per sample. What the context does with it is `plan.py`.
Shape letters: B batch, T tokens, I rows of the vision encoder or the projector.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from llava_cmoe.backbones.sites import image_token_of
from llava_cmoe.experts.plan import RouteContext


def follow_images(model: PreTrainedModel, context: RouteContext) -> None:
    """From now on, each forward pass that is given pixels tells `context` whose they are; steps of decoding are not."""
    tell = partial(_tell, context, model.config, image_token_of(model))
    context.image_hook = model.base_model.register_forward_pre_hook(tell, with_kwargs=True)
    # Of a model that reads images `generate` calls the encoder first and on its own, where nothing says whose they are.
    model.input_modalities = ["text"]


def unfollow_images(model: PreTrainedModel, context: RouteContext) -> None:
    """Leave the model as it was before `follow_images`; does nothing where nobody follows."""
    if context.image_hook is not None:
        context.image_hook.remove()
        context.image_hook = None
        del model.input_modalities  # the class's own shows again


def samples_of_images(placeholder_BT: Tensor, num_rows: int) -> Tensor:
    """Sample of each row (I,), from the prompts' image tokens (B, T): equally many per row, in the rows' order.

    True of images and crops that all become equally many tokens, and of patches, of which equally many become a token.
    Reads shapes alone on the host: no sync.
    """
    end_B = placeholder_BT.sum(dim=1).cumsum(dim=0)
    first_I = torch.arange(num_rows, device=end_B.device) * end_B[-1] // num_rows
    return torch.searchsorted(end_B, first_I, right=True)


def samples_of_crops(placeholder_BT: Tensor, crops: list[int], num_rows: int) -> Tensor:
    """Sample of each crop (I,), from the number of crops of each picture: one picture per sample with image tokens.

    Raises:
        ValueError: a sample has several pictures.
    """
    sample_N = placeholder_BT.any(dim=1).nonzero().squeeze(1)
    if len(sample_N) != len(crops):
        raise ValueError(
            f"{len(crops)} pictures in {len(sample_N)} samples: a model that cuts pictures into crops, with experts "
            "before the LLM, reads one picture per sample"
        )
    assert sum(crops) == num_rows, "the encoder reads every crop once"
    return sample_N.repeat_interleave(torch.tensor(crops, device=sample_N.device))


def _tell(
    context: RouteContext,
    config: PretrainedConfig,
    image_token: int | None,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    given = dict(zip(signature(model.forward).parameters, args, strict=False)) | kwargs
    input_ids, pixel_values = given.get("input_ids"), given.get("pixel_values")
    if input_ids is None or pixel_values is None:
        return
    placeholder_BT = input_ids == image_token
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if pinpoints is None:
        context.read_images(partial(samples_of_images, placeholder_BT))
    else:  # LLaVA-NeXT and its kin drop what padding became: the tokens of a picture do not say how many crops it has
        side = config.vision_config.image_size
        crops = [image_size_to_num_patches(size, pinpoints, side) for size in given["image_sizes"]]
        context.read_images(partial(samples_of_crops, placeholder_BT, crops))
