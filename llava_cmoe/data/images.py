"""Safe opening of image files, and the geometry that makes a picture square.

Resizing and normalising belong to the backbone's image processor; which geometry a task uses, to `tasks.py`.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from llava_cmoe.data.problems import DataError, Problem

Found = TypeVar("Found")

MAX_PIXELS = 80_000_000
"""Largest picture that is opened, in pixels: 240 MB as RGB, four times a large camera's."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Kinds of image that are read; Pillow knows more, one of which starts a PostScript interpreter."""

# What Pillow's decoders raise for broken files, besides OSError: a PNG chunk, an EXIF block, a short header.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open and fully decode an image as RGB, turned upright as its EXIF orientation says.

    Transparent pixels become white. (LLaVA drops the alpha channel, which turns the black-on-transparent diagrams
    of ScienceQA into black squares.)

    Raises:
        DataError: missing, not an image, larger than `max_pixels`, truncated or otherwise broken.
    """
    return _read(path, lambda: _decode(path, max_pixels), max_pixels)


def size_of(path: Path) -> tuple[int, int]:
    """Width and height in pixels as the header has them, in either order where the picture lies on its side.

    Raises:
        DataError: missing, or not an image.
    """
    return _read(path, lambda: _size(path), MAX_PIXELS)


def _read(path: Path, read: Callable[[], Found], max_pixels: int) -> Found:
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            return read()
    except FileNotFoundError as error:
        raise DataError(Problem(path, "image file is missing")) from error
    except Image.DecompressionBombError as error:
        raise DataError(Problem(path, f"oversized image ({error}); at most {max_pixels} pixels are opened")) from error
    except UnidentifiedImageError as error:
        raise DataError(Problem(path, f"not an image of the kinds {', '.join(FORMATS)}")) from error
    except BROKEN as error:
        raise DataError(Problem(path, f"truncated or broken image ({error})")) from error


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path, formats=FORMATS) as image:
        return image.size


def find_broken(paths: Iterable[str]) -> dict[str, str]:
    """Which of these pictures cannot be opened, and why."""
    broken = {}
    for path in paths:
        try:
            open_image(Path(path))
        except DataError as error:
            broken[path] = str(error)
    return broken


def _decode(path: Path, max_pixels: int) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:  # known from the header, before a decompression bomb could unfold
            raise Image.DecompressionBombError(f"{width} x {height} pixels")
        return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255 and leave a white picture
        image = image.convert("I").point(lambda grey: grey / 256).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers).convert("RGB")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre an image on a square of its longer side, as LLaVA does; boxes of CoIN's Grounding live on that square."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def shrink(image: Image.Image, max_pixels: int) -> Image.Image:
    """An image of at most `max_pixels` in the same proportions; a smaller one is returned as it is.

    Boxes in parts of width and height, as CoIN's Grounding has them, stay true, since both shrink by one factor.
    """
    size = shrunk_size(image.width, image.height, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def shrunk_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Width and height of what `shrink` makes."""
    scale = math.sqrt(max_pixels / (width * height))
    return (width, height) if scale >= 1 else (max(1, int(width * scale)), max(1, int(height * scale)))


def centre_crop(image: Image.Image) -> Image.Image:
    """Cut the centred square of the shorter side out of an image; what lies outside is lost."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))
