"""The frozen model, and what its parts are called."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llava_cmoe.settings.base import Settings

Name = Annotated[str, Field(min_length=1)]


class SiteSettings(Settings):
    """Where experts may live in the LLM of a backbone whose names are not Llama's."""

    layers: Name
    """Path of the list of LLM layers from the model's root, such as `transformer.h`."""
    ffn: Name
    """Path of the FFN inside a layer, such as `mlp`."""
    ffn_linears: tuple[Name, ...] = Field(min_length=1)
    """Paths of the FFN's linears inside it; the first one reads the FFN's own input, as routers do."""
    attention_linears: tuple[Name, ...] = ()
    """Paths of the attention's linears inside a layer; methods that adapt every linear use them."""


class BackboneSettings(Settings):
    """The frozen model that knowledge is added to."""

    path: Name = "pocket"
    """Hugging Face model folder or name, or `pocket` for the small LLaVA that ships with this package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision the frozen weights are loaded in; that in which the quantized ones compute."""
    quantization: Literal["none", "8bit", "nf4"] = "none"
    """Bits of the LLM's frozen linears, by bitsandbytes: 8 (LLM.int8) or 4 (NF4, QLoRA's); no other weight is touched.
    With 8bit the last digits of an answer depend on its batch, as outliers are looked for in all of it."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel; on a CPU with short samples `eager` trains faster (a fused backward takes thrice as long).
    `flash_attention_2` needs the package flash-attn and a GPU."""
    sites: SiteSettings | None = None
    """Names of the LLM's layers and linears; Llama's, which most LLMs share, when absent."""

    @model_validator(mode="after")
    def _flash_in_half(self) -> Self:
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("attention flash_attention_2 computes in 16 bits, dtype is float32; set dtype: bfloat16")
        return self
