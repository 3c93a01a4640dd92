"""Tells a route context when a forward pass begins, whether it is a prefill, and whose the pictures are that it reads.

The last is needed where banks sit before the LLM: there a row is an image, a crop or a patch of one, a text-only sample
has none, another may have several, and a plan is per sample. What the context does with it is `context.py`'s.
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
from llava_cmoe.experts.context import RouteContext, SampleOfRows


def follow(model: PreTrainedModel, context: RouteContext, of_images: bool) -> None:
    """From now on `context` learns of each forward pass of the model; with `of_images`, whose pictures it reads."""
    names = tuple(signature(model.base_model.forward).parameters)
    begin = partial(_begin, context, model.config, names, image_token_of(model) if of_images else None)
    context.hook = model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
    if of_images:
        # `generate` calls the encoder of a model that reads images first and alone, where nothing says whose they are.
        model.input_modalities = ["text"]


def unfollow(model: PreTrainedModel, context: RouteContext) -> None:
    """Leave the model as it was before `follow`."""
    assert context.hook is not None, "nobody follows this model"
    context.hook.remove()
    context.hook = None
    vars(model).pop("input_modalities", None)  # the class's own shows again


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


def _begin(
    context: RouteContext,
    config: PretrainedConfig,
    names: tuple[str, ...],
    image_token: int | None,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    if not context.routes:
        return
    given = dict(zip(names, args, strict=False)) | kwargs
    cache = given.get("past_key_values")
    context.begin_pass(
        is_prefill=cache is None or int(cache.get_seq_length()) == 0,
        sample_of=None if image_token is None else _sample_of(config, image_token, given),
    )


def _sample_of(config: PretrainedConfig, image_token: int, given: dict[str, Any]) -> SampleOfRows | None:
    input_ids, pixel_values = given.get("input_ids"), given.get("pixel_values")
    if input_ids is None or pixel_values is None:
        return None
    placeholder_BT = input_ids == image_token
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if pinpoints is None:
        return partial(samples_of_images, placeholder_BT)
    # LLaVA-NeXT and its kin drop what padding became: the tokens of a picture do not say how many crops it has.
    side = config.vision_config.image_size
    crops = [image_size_to_num_patches(size, pinpoints, side) for size in given["image_sizes"]]
    return partial(samples_of_crops, placeholder_BT, crops)
