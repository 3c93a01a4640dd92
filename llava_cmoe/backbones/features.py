"""The frozen feature that locators read: one layer's hidden states as one vector per prompt.

Read in a forward pass of its own that stops at the layer, or in passing, inside the pass that answers. Leaves to others
the choice of tokens and layer (the settings) and switching experts off (a RouteContext without a plan).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import PreTrainedModel

from llava_cmoe.backbones.sites import image_token_of, llm_layers

Feature = Literal["last", "mean", "vision", "text", "both"]


BOTH: tuple[Feature, Feature] = ("vision", "text")


def feature_width(model: PreTrainedModel, feature: Feature) -> int:
    """D of a feature."""
    width = int(model.config.get_text_config().hidden_size)
    return len(BOTH) * width if feature == "both" else width


class _LayerReached(Exception):
    """Carries the wanted hidden state out of a forward pass that need not go on; never leaves this file."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD


@torch.no_grad()
def prompt_feature(model: PreTrainedModel, batch: Mapping[str, Tensor], layer: int, feature: Feature) -> Tensor:
    """One vector per prompt, from the hidden states that the frozen model computes at one layer.

    Padding is first moved to the right end and cut to the longest prompt: a causal model's real tokens never see it
    there, so the feature has the same bits whichever side the batch was padded on, and however far.

    Args:
        model: a stock transformers model that generates text.
        batch: the processor's tensors of *prompts*, with `input_ids` and `attention_mask` (B, T).
        layer: index into transformers' `hidden_states`: 0 is the embedding output with the image features in place,
            k the output of the k-th LLM layer, and -1 the last layer's output *after* the final norm.
        feature: the last token's state, or the mean state of all tokens, of the image's (`vision`; zeros for a prompt
            without one), or of the others (`text`; above layer 0 they have seen the image). `both` has those two side
            by side, each normalised, so that neither's scale drowns the other.

    Returns:
        feature_BD in float32, without gradient; twice as wide as the model for `both`.

    Raises:
        ValueError: no such layer, an empty prompt, or a batch with `labels` (its last token would be the answer's); the
            feature `vision` of a model that reads no pictures.
    """
    _refuse_what_is_no_prompt(batch)
    prompts = _flush_left(batch)
    return _pooled(model, prompts, _hidden_state(model, prompts, layer), feature)


@contextmanager
def feature_in_passing(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    layer: int,
    feature: Feature,
    read: Callable[[Tensor], None],
) -> Iterator[None]:
    """Hand the feature over from inside the next forward pass of these prompts, before that layer runs; only once.

    Nothing is computed for it, and later passes (decoding) are not touched. The pass must compute up to that layer what
    the frozen model does. It keeps the batch's padding, so the feature agrees with `prompt_feature` but for rounding:
    `generate` counts positions from the first real token on either side of padding, and padding adds exact zeros to a
    softmax, but a kernel adds up a longer row in another order.

    Args:
        model: as of `prompt_feature`.
        batch: the prompts that the pass will read, with the padding it will read them with.
        layer: index into `hidden_states`, counted from 0; the last layer's output enters no layer and is not on offer.
        feature: as of `prompt_feature`.
        read: called with feature_BD.

    Raises:
        ValueError: no such layer, an empty prompt, a batch with `labels`, or, from the pass, other prompts than these.
    """
    _refuse_what_is_no_prompt(batch)
    layers = llm_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"no LLM layer {layer} to read a feature before: this model has 0 to {len(layers) - 1}")

    @torch.no_grad()
    def pass_on(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hook.remove()
        hidden_BTD = _entering(args, kwargs)
        if hidden_BTD.shape[:2] != batch["attention_mask"].shape:
            raise ValueError(
                f"prompts of shape {tuple(batch['attention_mask'].shape)} were to be located, the forward pass reads "
                f"{tuple(hidden_BTD.shape[:2])}; read them whole, without prefill_chunk_size"
            )
        read(_pooled(model, batch, hidden_BTD, feature))

    hook = layers[layer].register_forward_pre_hook(pass_on, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _refuse_what_is_no_prompt(batch: Mapping[str, Tensor]) -> None:
    if "labels" in batch:
        raise ValueError("the locator's feature is read from prompts; collate them without answers and `labels`")
    length_B = batch["attention_mask"].sum(dim=1)
    if int(length_B.min()) == 0:
        raise ValueError(f"prompt {int(length_B.argmin())} of the batch is empty; give every sample at least one token")


def _pooled(model: PreTrainedModel, prompts: Mapping[str, Tensor], hidden_BTD: Tensor, feature: Feature) -> Tensor:
    """One vector per prompt (B, D) in float32, padding on either side."""
    if feature == "last":
        mask_BT = prompts["attention_mask"].to(hidden_BTD.device)
        place_T = torch.arange(mask_BT.shape[1], device=hidden_BTD.device)
        last_B = (mask_BT.bool() * place_T).argmax(dim=1)
        return hidden_BTD[torch.arange(len(last_B), device=hidden_BTD.device), last_B].float()
    if feature == "both":
        parts = (_pooled(model, prompts, hidden_BTD, part) for part in BOTH)
        return torch.cat([layer_norm(part_BD, part_BD.shape[-1:]) for part_BD in parts], dim=1)
    return _mean(hidden_BTD, _averaged(model, prompts, feature).to(hidden_BTD.device))


def _averaged(model: PreTrainedModel, prompts: Mapping[str, Tensor], feature: Feature) -> Tensor:
    """Which tokens a mean is taken over, (B, T)."""
    real_BT = prompts["attention_mask"].bool()
    if feature == "mean":
        return real_BT
    image_token = image_token_of(model)
    if image_token is None:
        if feature == "vision":
            raise ValueError(
                f"a {model.config.model_type} reads no pictures; set locator.feature to last, mean or text"
            )
        return real_BT
    image_BT: Tensor = prompts["input_ids"] == image_token
    return real_BT & (image_BT if feature == "vision" else ~image_BT)


def _mean(hidden_BTD: Tensor, chosen_BT: Tensor) -> Tensor:
    """Mean over the chosen tokens, zeros where there are none: (B, D) in float32.

    The order of a sum depends on the batch's length, hence on batch mates. Summed in float64 and rounded once, sums in
    any order agree, short of a tie in the rounding.
    """
    sum_BD = hidden_BTD.masked_fill(~chosen_BT.unsqueeze(-1), 0).sum(dim=1, dtype=torch.float64)
    return (sum_BD / chosen_BT.sum(dim=1, keepdim=True).clamp_min(1)).float()


def _flush_left(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with every row's real tokens first and in order; image tensors are left as they are."""
    mask_BT = batch["attention_mask"]
    order_BT = mask_BT.argsort(dim=1, descending=True, stable=True)[:, : int(mask_BT.sum(dim=1).max())]
    return {
        name: tensor.gather(1, order_BT) if tensor.shape == mask_BT.shape else tensor for name, tensor in batch.items()
    }


def check_layer(model: PreTrainedModel, layer: int) -> None:
    """Raise a ValueError unless the model's LLM has a layer to read features from."""
    num_layers = len(llm_layers(model))
    if not -num_layers - 1 <= layer <= num_layers:
        raise ValueError(f"layer {layer} does not exist: this model has 0 (embedding) to {num_layers}; -1 is the last")


def _hidden_state(model: PreTrainedModel, batch: Mapping[str, Tensor], layer: int) -> Tensor:
    """`hidden_states[layer]`, by leaving the stock forward pass where that layer's output is handed to the next one.

    Running the model's own code keeps the bits and every architecture's own embedding, mask and position rules.
    Under ZeRO-3 leave the engine's hooks out of it: a forward that stops half-way confuses its prefetching.
    """
    check_layer(model, layer)
    layers = llm_layers(model)

    def leave(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        raise _LayerReached(_entering(args, kwargs))

    wanted = layer % (len(layers) + 1)
    if wanted == len(layers):
        return _forward(model, batch).last_hidden_state  # type: ignore[no-any-return]
    hook = layers[wanted].register_forward_pre_hook(leave, with_kwargs=True)
    try:
        _forward(model, batch)
    except _LayerReached as reached:
        return reached.hidden_BTD
    finally:
        hook.remove()
    raise AssertionError(f"the forward pass of {type(model).__name__} never called its layer {wanted}")


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments that an LLM layer is called with."""
    hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden_BTD


def _forward(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Any:
    """The model without its language-modelling head, and without filling a cache nobody reads."""
    return model.base_model(**batch, use_cache=False)
