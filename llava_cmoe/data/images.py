"""Safe opening of image files, and the geometry that makes a picture square.

Resizing and normalising belong to the backbone's image processor; which geometry a task uses, to `tasks.py`; what grey
of more than 8 bits becomes, to `deep_grey.py`. A limit holds for what is allocated, not for what a file promises: a
strip of 60000 x 4 pixels is small, and the square around it 10 GB.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from llava_cmoe.data.deep_grey import DEEP, grey_of_8_bits
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.tasks import Geometry

Found = TypeVar("Found")

PictureFile = Path | BytesIO
"""An image file, or the bytes of one that never was on disk."""

MAX_PIXELS = 80_000_000
"""Largest picture that is opened, and largest square that is made, in pixels: 240 MB as RGB, four times a large
camera's."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Kinds of image that are read; Pillow knows more, one of which starts a PostScript interpreter."""

# What Pillow's decoders raise for broken files, besides OSError: a PNG chunk, an EXIF block, a short header.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def open_image(path: PictureFile, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open and fully decode an image as RGB, turned upright as its EXIF orientation says.

    Transparent pixels become white. (LLaVA drops the alpha channel, which turns the black-on-transparent diagrams
    of ScienceQA into black squares.)

    Raises:
        DataError: missing, not an image, larger than `max_pixels`, truncated or otherwise broken.
    """
    return _read(path, lambda: _decode(path, max_pixels), max_pixels)


def size_of(path: PictureFile) -> tuple[int, int]:
    """Width and height in pixels as the header has them, in either order where the picture lies on its side.

    Raises:
        DataError: missing, or not an image.
    """
    return _read(path, lambda: _size(path), MAX_PIXELS)


def name_of(picture: PictureFile) -> Path:
    """What errors call a picture; one that has no file is just that."""
    return picture if isinstance(picture, Path) else Path("picture")


def _read(picture: PictureFile, read: Callable[[], Found], max_pixels: int) -> Found:
    path = name_of(picture)
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
    except MemoryError as error:
        raise DataError(Problem(path, "too little memory to open it; make the picture smaller")) from error


def _size(path: PictureFile) -> tuple[int, int]:
    with Image.open(path, formats=FORMATS) as image:
        return image.size


def side_of_square(path: PictureFile, geometry: Geometry, max_pixels: int | None) -> int:
    """The side in pixels of the square that is made of a picture, from the file's header alone.

    Args:
        path: of the picture.
        geometry: whether it is padded or cropped.
        max_pixels: largest square that is wanted; any when None.

    Raises:
        DataError: missing, not an image, or a square of more than `MAX_PIXELS` pixels.
    """
    width, height = size_of(path)
    side = min(width, height) if geometry == "crop" else max(width, height)
    made = side if max_pixels is None else shrunk_size(side, side, max_pixels)[0]
    if made * made > MAX_PIXELS:
        reason = f"oversized image ({width} x {height} pixels, padded to a square of {made} x {made})"
        fix = "set data.max_pixels, which shrinks it first, or cut the picture"
        raise DataError(Problem(name_of(path), f"{reason}; squares of at most {MAX_PIXELS} pixels are made: {fix}"))
    return made


def find_broken(pictures: Iterable[tuple[str, Geometry, int | None]]) -> dict[str, str]:
    """Which of these pictures cannot be opened or squared, and why; each with the arguments of `side_of_square`."""
    broken = {}
    for path, geometry, max_pixels in pictures:
        try:
            open_image(Path(path))
            side_of_square(Path(path), geometry, max_pixels)
        except DataError as error:
            broken[path] = str(error)
    return broken


def _decode(path: PictureFile, max_pixels: int) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:  # known from the header, before a decompression bomb could unfold
            raise Image.DecompressionBombError(f"{width} x {height} pixels")
        tags = dict(getattr(image, "tag_v2", {}))  # a TIFF's, which a turned copy has lost
        return _to_rgb(ImageOps.exif_transpose(image), tags)


def _to_rgb(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    if image.mode.startswith(DEEP):
        image = grey_of_8_bits(image, tags)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers).convert("RGB")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int], side: int | None = None) -> Image.Image:
    """Centre an image on a square of its longer side, as LLaVA does; boxes of CoIN's Grounding live on that square.

    A smaller `side` shrinks the image first, so that no square of its own size is ever made; a box then stays where it
    is up to a pixel.
    """
    longer = max(image.size)
    if side is not None and side < longer:
        width, height = (max(1, round(length * side / longer)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
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
