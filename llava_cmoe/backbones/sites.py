"""Where experts may live in a backbone: module paths per architecture, read from its config.

Touches no module: `experts/surgery.py` edits the tree. A new architecture is one more row in each table below.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Site:
    """A place that may hold experts: the FFN of one layer, the projector, or one linear.

    Attributes:
        name: module path from the model's root, such as `model.language_model.layers.3.mlp`.
        layer: depth of its layer in the LLM or in the vision encoder, from 0; 0 for the projector.
        linears: paths of its linears relative to `name`; the first one reads the site's own input, which routers
            read too. A site that is itself one linear has `("",)`.
        of_images: True in the vision encoder and the projector: a row of the batch is an image there, not a sample.
    """

    name: str
    layer: int
    linears: tuple[str, ...]
    of_images: bool = False


@dataclass(frozen=True)
class DecoderLayer:
    """Names inside one LLM layer: the FFN and its linears (an input projection first), the attention's linears."""

    ffn: str
    ffn_linears: tuple[str, ...]
    attention_linears: tuple[str, ...]


@dataclass(frozen=True)
class VisionEncoder:
    """Names inside a vision encoder: its list of layers; in each the FFN and its linears, an input projection first."""

    layers: str
    ffn: str
    ffn_linears: tuple[str, ...]


@dataclass(frozen=True)
class ImagePath:
    """What images pass before the LLM: paths of the vision encoder and the projector, the projector's linears."""

    encoder: str
    projector: str
    projector_linears: tuple[str, ...]


LAYER_LISTS = {"llava": "model.language_model.layers", "llama": "model.layers"}
"""Type of the whole model to the path of its LLM layers."""

DECODER_LAYERS = {
    "llama": DecoderLayer(
        ffn="mlp",
        ffn_linears=("gate_proj", "up_proj", "down_proj"),
        attention_linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ),
}
"""Type of the LLM (the model's text config) to the names inside one of its layers."""

IMAGE_PATHS = {"llava": ImagePath("model.vision_tower", "model.multi_modal_projector", ("linear_1", "linear_2"))}
"""Type of the whole model to what images pass before its LLM."""

VISION_ENCODERS = {"clip_vision_model": VisionEncoder("encoder.layers", ffn="mlp", ffn_linears=("fc1", "fc2"))}
"""Type of the vision encoder (the model's vision config) to the names inside it."""


def ffn_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The LLM's FFNs in order of depth; the linears of one site share a gate.

    Raises:
        ValueError: unknown architecture; the message lists the known ones.
    """
    path, inside, depth = _layout(model.config)
    return tuple(Site(f"{path}.{layer}.{inside.ffn}", layer, inside.ffn_linears) for layer in range(depth))


def linear_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Every linear of the LLM's attention and FFN as a site of its own; never lm_head, vision or projector.

    Raises:
        ValueError: unknown architecture; the message lists the known ones.
    """
    path, inside, depth = _layout(model.config)
    linears = (*inside.attention_linears, *(f"{inside.ffn}.{linear}" for linear in inside.ffn_linears))
    return tuple(Site(f"{path}.{layer}.{linear}", layer, ("",)) for layer in range(depth) for linear in linears)


def vision_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The vision encoder's FFNs in order of depth, without layers above the one whose states the LLM is given.

    Raises:
        ValueError: unknown architecture; the message lists the known ones.
    """
    path, vision = _image_path(model.config).encoder, model.config.vision_config
    if vision.model_type not in VISION_ENCODERS:
        raise ValueError(
            f"no sites are known in a vision encoder of type {vision.model_type!r}; known: "
            f"{', '.join(sorted(VISION_ENCODERS))}. Add the names in it to VISION_ENCODERS in backbones/sites.py"
        )
    inside, chosen = VISION_ENCODERS[vision.model_type], model.config.vision_feature_layer
    states = int(vision.num_hidden_layers) + 1  # transformers' `hidden_states`: k is the output of the k-th layer
    depth = max(index % states for index in ([chosen] if isinstance(chosen, int) else chosen))
    return tuple(
        Site(f"{path}.{inside.layers}.{layer}.{inside.ffn}", layer, inside.ffn_linears, of_images=True)
        for layer in range(depth)
    )


def projector_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The projector as one site.

    Raises:
        ValueError: unknown architecture; the message lists the known ones.
    """
    path = _image_path(model.config)
    return (Site(path.projector, 0, path.projector_linears, of_images=True),)


def _image_path(config: PretrainedConfig) -> ImagePath:
    if config.model_type not in IMAGE_PATHS:
        raise ValueError(
            f"no vision encoder and projector are known in a model of type {config.model_type!r}; known: "
            f"{', '.join(sorted(IMAGE_PATHS))}. Add their paths to IMAGE_PATHS in backbones/sites.py"
        )
    return IMAGE_PATHS[config.model_type]


def _layout(config: PretrainedConfig) -> tuple[str, DecoderLayer, int]:
    """Path of the layer list, names inside a layer, number of layers."""
    text = config.get_text_config()
    if config.model_type not in LAYER_LISTS:
        raise ValueError(
            f"no sites are known in a model of type {config.model_type!r}; known: {', '.join(sorted(LAYER_LISTS))}. "
            "Add the path of its LLM layers to LAYER_LISTS in backbones/sites.py"
        )
    if text.model_type not in DECODER_LAYERS:
        raise ValueError(
            f"no sites are known in an LLM of type {text.model_type!r}; known: {', '.join(sorted(DECODER_LAYERS))}. "
            "Add the names of its linears to DECODER_LAYERS in backbones/sites.py"
        )
    return LAYER_LISTS[config.model_type], DECODER_LAYERS[text.model_type], int(text.num_hidden_layers)
