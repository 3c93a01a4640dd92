"""Grey pictures of more than 8 bits a pixel, as the 8 bits that backbones read.

Pillow clips such numbers at 255: 16 bits become a white picture, brightness from 0 to 1 a black one. Here they are
scaled by a usual range that they fill (0 to 65535 of 16 bits, else 0 to 255, or 0 to 1 of fractions), and where there
is none from the picture's own lowest number to its highest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

DEEP = ("I", "F")
"""Beginnings of the modes that hold more than 8 bits: I;16 in both byte orders, I, F."""

USUAL = {"I;16": (65535,), "I": (255,), "F": (1, 255)}
"""Numbers that stand for white, where black is 0."""

FILLED = 4
"""A range is used where its highest number is at least a quarter of white: 12 bits in 16 would be a black picture."""

WHITE_IS_ZERO, SAMPLE_BITS, SAMPLE_FORMAT = 262, 258, 339
"""TIFF tags that Pillow reads, and leaves unheeded in these modes."""


def grey_of_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """A picture of a mode of `DEEP` as one of mode L; a transparent colour becomes white.

    Args:
        image: the picture.
        tags: of its file, where that is a TIFF.

    Raises:
        ValueError: numbers that are not finite.
    """
    values_HW = np.asarray(image)
    if image.mode == "I" and tags.get(SAMPLE_FORMAT) in (1, (1,)) and tags.get(SAMPLE_BITS) in (32, (32,)):
        values_HW = values_HW.view(np.uint32)  # Pillow reads them as if they had a sign
    lowest, highest = float(values_HW.min()), float(values_HW.max())
    if not np.isfinite((lowest, highest)).all():
        raise ValueError("it holds numbers that are not finite; save it with 8 bits a channel")
    black, white = _range(image.mode[:4], lowest, highest)
    grey_HW = np.rint((values_HW - np.float32(black)) * np.float32(255 / (white - black)))
    if tags.get(WHITE_IS_ZERO) == 0:
        grey_HW = 255 - grey_HW
    if (transparent := image.info.get("transparency")) is not None:
        grey_HW[values_HW == transparent] = 255
    return Image.fromarray(grey_HW.clip(0, 255).astype(np.uint8))


def _range(mode: str, lowest: float, highest: float) -> tuple[float, float]:
    """The numbers that stand for black and for white."""
    usual = [white for white in USUAL[mode] if lowest >= 0 and highest <= white]
    if usual and (highest * FILLED >= usual[0] or lowest == highest):
        return 0.0, float(usual[0])
    _say_once(mode)
    return (lowest, highest) if lowest < highest else (min(lowest, 0.0), max(highest, 1.0))


@cache
def _say_once(mode: str) -> None:
    logger.warning("a picture of mode %s fills no usual range: such ones are scaled by their own numbers", mode)
