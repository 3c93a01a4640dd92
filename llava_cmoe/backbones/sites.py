"""Where experts may live in a backbone: module paths by family, checked against the model itself.

Touches no module: `experts/surgery.py` edits the tree. A new family is one row of `FAMILIES`. Names of an LLM's layers
that are not the usual ones come from the recipe (`backbone.sites`), by way of the model's config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from llava_cmoe.settings.backbone import SiteSettings
from llava_cmoe.settings.base import RecipeError


@dataclass(frozen=True)
class Site:
    """A place that may hold experts: attention or FFN of one layer, the projector, or one linear.

    Attributes:
        name: module path from the model's root, such as `model.language_model.layers.3.mlp`.
        layer: depth of its layer in the LLM or in the vision encoder, from 0; 0 for the projector.
        linears: paths of its linears relative to `name`; the first one reads the site's own input, which routers
            read too. A site that is itself one linear has `("",)`.
        of_images: True in the vision encoder and the projector: a row of the batch is an image there, or a crop or a
            patch of one, not a sample.
    """

    name: str
    layer: int
    linears: tuple[str, ...]
    of_images: bool = False


@dataclass(frozen=True)
class Family:
    """What images pass before the LLM in one family of models.

    Attributes:
        vision: path of the vision encoder's list of layers; the FFN of each is called `mlp`.
        vision_linears: the linears of such an FFN, an input projection first.
        projector: paths of the projector's sites to their linears. Where a norm or a reshaping stands before the first
            linear, each linear is a site of its own.
    """

    vision: str
    vision_linears: tuple[str, ...]
    projector: Mapping[str, tuple[str, ...]]


GATED, PLAIN = ("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2")
LLAVA = Family("model.vision_tower.encoder.layers", PLAIN, {"model.multi_modal_projector": ("linear_1", "linear_2")})
IDEFICS3 = Family("model.vision_model.encoder.layers", PLAIN, {"model.connector.modality_projection": ("proj",)})
FAMILIES = {
    "llava": LLAVA,
    "llava_next": LLAVA,
    "llava_onevision": LLAVA,
    "qwen2_5_vl": Family("model.visual.blocks", GATED, {"model.visual.merger.mlp": ("0", "2")}),
    "qwen3_vl": Family(
        "model.visual.blocks",
        ("linear_fc1", "linear_fc2"),
        {"model.visual.merger.linear_fc1": ("",), "model.visual.merger.linear_fc2": ("",)},
    ),
    "internvl": Family(
        "model.vision_tower.encoder.layer",
        PLAIN,
        {"model.multi_modal_projector.linear_1": ("",), "model.multi_modal_projector.linear_2": ("",)},
    ),
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
    "gemma3": Family("model.vision_tower.encoder.layers", PLAIN, {}),  # projects by a bare matrix
    "paligemma": Family("model.vision_tower.encoder.layers", PLAIN, {"model.multi_modal_projector": ("linear",)}),
}
"""Type of the whole model to what images pass before its LLM."""

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
"""Llama's names, and those of nearly every LLM since; its FFN is `mlp` with the linears of `GATED`."""

NAMED = "expert_sites"
"""Attribute of a model's config that holds the recipe's `backbone.sites`, where it names them."""


def name_sites(model: PreTrainedModel, names: SiteSettings) -> None:
    """Look for the LLM's layers under these names from now on."""
    setattr(model.config, NAMED, names.model_dump())


def llm_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The LLM's layers in order of depth.

    Raises:
        RecipeError: unknown architecture; the message says how to name its sites.
    """
    names: dict[str, str] | None = getattr(model.config, NAMED, None)
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    layers = _module(model, names["layers"]) if names else getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        _refuse(model, f"{names['layers']} is no list of layers" if names else "its LLM has no list `layers`")
    return layers


def image_token_of(model: PreTrainedModel) -> int | None:
    """The token that stands where the LLM is given a piece of a picture; None of a model that reads text alone."""
    token: int | None = getattr(model.config, "image_token_id", None)
    return token


def ffn_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The LLM's FFNs in order of depth; the linears of one site share a gate.

    Raises:
        RecipeError: unknown architecture; the message says how to name its sites.
    """
    names, depth = _names(model), len(llm_layers(model))
    sites = tuple(Site(f"{names.layers}.{layer}.{names.ffn}", layer, names.ffn_linears) for layer in range(depth))
    return _checked(model, sites)


def attention_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The LLM's attention blocks in order of depth; the linears of one site share a gate.

    Raises:
        RecipeError: unknown architecture, or attention linears that lie in no common block that reads them first.
    """
    names, depth = _names(model), len(llm_layers(model))
    blocks = {linear.partition(".")[0] for linear in names.attention_linears if "." in linear}
    if len(blocks) != 1 or not all("." in linear for linear in names.attention_linears):
        _refuse(model, "its attention linears lie in no common block, as self_attn.q_proj and self_attn.v_proj do")
    (block,) = blocks
    linears = tuple(linear.partition(".")[2] for linear in names.attention_linears)
    sites = tuple(Site(f"{names.layers}.{layer}.{block}", layer, linears) for layer in range(depth))
    return _checked(model, sites)


def linear_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Every linear of the LLM's attention and FFN as a site of its own; never lm_head, vision or projector.

    Raises:
        RecipeError: unknown architecture; the message says how to name its sites.
    """
    names, depth = _names(model), len(llm_layers(model))
    linears = (*names.attention_linears, *(f"{names.ffn}.{linear}" for linear in names.ffn_linears))
    sites = (Site(f"{names.layers}.{layer}.{linear}", layer, ("",)) for layer in range(depth) for linear in linears)
    return _checked(model, tuple(sites))


def vision_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The vision encoder's FFNs in order of depth, without layers above the one whose states the LLM is given.

    Raises:
        RecipeError: unknown architecture; the message lists the known ones.
    """
    family = _family(model)
    layers = _module(model, family.vision)
    if not isinstance(layers, nn.ModuleList):
        kind = model.config.vision_config.model_type
        raise RecipeError(
            f"no sites are known in a vision encoder of type {kind!r} in a {model.config.model_type}; leave vision out "
            "of experts.also_in"
        )
    chosen, states = getattr(model.config, "vision_feature_layer", -1), len(layers) + 1
    # transformers' `hidden_states`: k is the output of the k-th layer
    depth = max(index % states for index in ([chosen] if isinstance(chosen, int) else chosen))
    return tuple(
        Site(f"{family.vision}.{layer}.mlp", layer, family.vision_linears, of_images=True) for layer in range(depth)
    )


def projector_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The projector, as one site wherever its first linear reads its input.

    Raises:
        RecipeError: unknown architecture, or one whose projector holds no linear.
    """
    sites = _family(model).projector
    if not sites:
        raise RecipeError(
            f"the projector of a {model.config.model_type} holds no linear; leave projector out of experts.also_in"
        )
    return tuple(Site(name, 0, linears, of_images=True) for name, linears in sites.items())


def _family(model: PreTrainedModel) -> Family:
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise RecipeError(
            f"no vision encoder and projector are known in a model of type {kind!r}; known: "
            f"{', '.join(sorted(FAMILIES))}. Leave experts.also_in empty, or add it to FAMILIES in backbones/sites.py"
        )
    return FAMILIES[kind]


def _names(model: PreTrainedModel) -> SiteSettings:
    """Names of the LLM's layers and of what is in them: the recipe's, or else the usual ones."""
    if named := getattr(model.config, NAMED, None):
        return SiteSettings(**named)
    layers = llm_layers(model)
    path = next(name for name, module in model.named_modules() if module is layers)
    return SiteSettings(layers=path, ffn="mlp", ffn_linears=GATED, attention_linears=ATTENTION)


def _checked(model: PreTrainedModel, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites, all of whose linears are there; that of a whole FFN reads a state of the LLM's width first."""
    width = model.config.get_text_config().hidden_size
    for site in sites:
        linears = {path: _module(model, f"{site.name}.{path}".removesuffix(".")) for path in site.linears}
        for path, linear in linears.items():
            if not (hasattr(linear, "in_features") and hasattr(linear, "out_features")):
                _refuse(model, f"there is no linear {site.name}.{path}".removesuffix("."))
        first: Any = linears[site.linears[0]]
        if len(linears) > 1 and first.in_features != width:
            _refuse(
                model,
                f"{site.name}.{site.linears[0]} reads {first.in_features} features where the LLM has {width}; the "
                "first linear named must read the block's own input",
            )
    return sites


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _refuse(model: PreTrainedModel, reason: str) -> NoReturn:
    kind, inside = model.config.model_type, model.config.get_text_config().model_type
    raise RecipeError(
        f"where experts may live in a model of type {kind!r} (its LLM: {inside!r}) is not known: {reason}. Name the "
        "LLM's layers and what is in them in the recipe: backbone.sites: {layers: model.layers, ffn: mlp, ffn_linears: "
        "[gate_proj, up_proj, down_proj], attention_linears: [self_attn.q_proj, self_attn.v_proj]}"
    )
