"""Pictures open upright as RGB or fail with a reason; squares keep boxes where CoIN's Grounding puts them."""

import io
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_cmoe.data import images
from llava_cmoe.data.encoding import Encoding, open_square
from llava_cmoe.data.images import centre_crop, find_broken, open_image, pad_to_square, shrink, side_of_square
from llava_cmoe.data.problems import DataError

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)
SIDES = st.integers(1, 60)


def _encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((33, 21), 80).convert("RGB").save(stream, kind)
    return stream.getvalue()


ENCODED = {kind: _encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_opens_as_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("L", (5, 4), 255).convert(mode).save(tmp_path / "x.png")
    image = open_image(tmp_path / "x.png")
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    drawing = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    drawing.putpixel((1, 0), (0, 0, 0, 255))
    drawing.save(tmp_path / "x.png")
    image = open_image(tmp_path / "x.png")
    assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == (WHITE, (0, 0, 0))


def test_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    drawing = Image.new("P", (2, 1), 0)
    drawing.putpalette([0, 0, 0, 255, 0, 0])
    drawing.putpixel((1, 0), 1)
    drawing.save(tmp_path / "x.png", transparency=0)
    image = open_image(tmp_path / "x.png")
    assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == (WHITE, RED)


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    Image.new("I;16", (2, 2), 0x7FFF).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").getpixel((0, 0)) == (127, 127, 127)


WIDTH = 64
RANGES: dict[str, list[tuple[float, float]]] = {
    "I;16": [(0, 65535), (0, 16383), (0, 4095), (300, 20000), (7000, 9000)],
    "I;16B": [(0, 65535), (0, 4095)],
    "I": [(0, 255), (0, 4095), (0, 65535), (0, 2**31 - 1), (-(2**31), 2**31 - 1), (-1000, 3000), (29000, 31000)],
    "F": [(0, 1), (0, 255), (0, 65535), (-1, 1), (0, 1e-3), (0, 1e6), (290, 310), (-1e4, -1e3)],
}


def _gradient(mode: str, black: float, white: float) -> Image.Image:
    """From black on the left to white on the right."""
    numbers = np.linspace(black, white, WIDTH)[None].repeat(4, axis=0)
    if mode in RANGES:
        kind = {"I;16": "<u2", "I;16B": ">u2", "I": "i4", "F": "f4"}[mode]
        return Image.fromarray(numbers.astype(kind))
    grey = Image.fromarray(numbers.astype("u1"))
    return grey.convert("RGBA").convert(mode) if mode in ("PA", "RGBa") else grey.convert(mode)


PLAIN = ("L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")


@pytest.mark.parametrize(
    ("mode", "black", "white"),
    [*((mode, *ends) for mode, ranges in RANGES.items() for ends in ranges), *((mode, 0, 255) for mode in PLAIN)],
)
def test_a_gradient_stays_a_gradient_in_every_mode_and_file(
    tmp_path: Path, mode: str, black: float, white: float
) -> None:
    """Neither clipped nor wrapped nor flattened: brightness grows all the way."""
    picture = _gradient("RGB", 0, 255) if mode == "LAB" else _gradient(mode, black, white)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        picture = ImageCms.applyTransform(picture, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    saved = 0
    for ending, options in {"png": {}, "tif": {}, "jpg": {"quality": 95}, "bmp": {}, "gif": {}}.items():
        deep = mode in RANGES
        if deep and ending == "gif":  # Pillow clips while it writes
            continue
        try:
            picture.save(tmp_path / f"x.{ending}", **options)
        except (OSError, ValueError):  # a kind that has no such mode
            continue
        saved += 1
        greys = np.asarray(open_image(tmp_path / f"x.{ending}").convert("L"))[1].astype(int)
        whitest = 60 if (black, white) == (300, 20000) else 240  # of 65535 that is less than a third
        assert greys[0] <= 8 and greys[-1] >= whitest, (ending, greys)
        assert all(right >= left - 3 * (ending == "jpg") for left, right in pairwise(greys)), (ending, greys)
        assert len(set(greys)) >= 16
    assert saved


@pytest.mark.parametrize("mode", ["1", "LA", "P"])
def test_transparency_and_two_levels_keep_both_ends(tmp_path: Path, mode: str) -> None:
    picture = _gradient("L", 0, 255).convert(mode)
    options: dict[str, Any] = {"transparency": bytes([255] * 128 + [0] * 128)} if mode == "P" else {}
    picture.save(tmp_path / "x.png", **options)
    greys = np.asarray(open_image(tmp_path / "x.png").convert("L"))[1]
    assert greys[0] == 0 and greys[-1] == 255


def _with_tag(picture: Image.Image, file: Path, tag: int, value: int) -> None:
    """Save as TIFF and change a tag's number in the bytes, since Pillow writes its own."""
    picture.save(file)
    content = bytearray(file.read_bytes())
    place = content.index(struct.pack("<HHI", tag, 3, 1), 8)
    content[place + 8 : place + 10] = struct.pack("<H", value)
    file.write_bytes(content)


def test_a_tiff_of_unsigned_32_bits_and_one_whose_zero_is_white(tmp_path: Path) -> None:
    """Pillow reads the first as if it had a sign, and does not turn the second."""
    numbers = np.linspace(0, 2**32 - 1, WIDTH).astype("u4")[None].repeat(4, axis=0)
    _with_tag(Image.fromarray(numbers.view("i4")), tmp_path / "unsigned.tif", 339, 1)
    _with_tag(_gradient("I;16", 0, 65535), tmp_path / "turned.tif", 262, 0)
    for name, turned in (("unsigned.tif", False), ("turned.tif", True)):
        with Image.open(tmp_path / name) as file:
            assert file.tag_v2[262 if turned else 339] in (0, (1,))  # what is tested was written
        greys = np.asarray(open_image(tmp_path / name).convert("L"))[1].astype(int)
        greys = greys[::-1] if turned else greys
        assert greys[0] == 0 and greys[-1] == 255 and all(a <= b for a, b in pairwise(greys)), (name, greys)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path, odd: float) -> None:
    numbers = np.linspace(0, 1, WIDTH, dtype="f4")[None].repeat(4, axis=0)
    numbers[2, 3] = odd
    Image.fromarray(numbers).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif: .*not finite; save it with 8 bits"):
        open_image(tmp_path / "x.tif")


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    lying = Image.new("RGB", (2, 1), RED)
    lying.putpixel((1, 0), BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored right edge is the bottom
    lying.save(tmp_path / "x.png", exif=exif)
    image = open_image(tmp_path / "x.png")
    assert image.size == (1, 2)
    assert (image.getpixel((0, 0)), image.getpixel((0, 1))) == (RED, BLUE)


def test_bad_pictures_are_named_with_the_reason(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "large.png")
    (tmp_path / "cut.jpg").write_bytes(ENCODED["JPEG"][:-100])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    # A header that promises 60,000 x 60,000 pixels, beyond what Pillow itself agrees to.
    bomb = bytearray(ENCODED["BMP"])
    bomb[18:26] = (60_000).to_bytes(4, "little") * 2
    (tmp_path / "bomb.bmp").write_bytes(bomb)
    for name, reason in {
        "none.png": "image file is missing",
        "large.png": "oversized image (30 x 20 pixels); at most 599 pixels are opened",
        "bomb.bmp": "oversized image",
        "cut.jpg": "truncated or broken image",
        "text.png": "not an image",
        "folder.png": "truncated or broken image",
    }.items():
        with pytest.raises(DataError) as error:
            open_image(tmp_path / name, max_pixels=599 if name == "large.png" else 80_000_000)
        assert error.value.problem.file == tmp_path / name
        assert error.value.problem.reason.startswith(reason)


def test_a_picture_of_exactly_the_limit_opens(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png", max_pixels=600).size == (30, 20)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow comments on what it repairs
@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(ENCODED)),
    keep=st.floats(0, 1),
    changes=st.dictionaries(st.floats(0, 1, exclude_max=True), st.integers(0, 255), max_size=4),
)
def test_damaged_bytes_give_a_picture_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, keep: float, changes: dict[float, int]
) -> None:
    content = bytearray(ENCODED[kind])
    for place, value in changes.items():
        content[int(place * len(content))] = value
    file = tmp_path_factory.getbasetemp() / "damaged.img"
    file.write_bytes(content[: round(keep * len(content))])
    try:
        assert open_image(file).mode == "RGB"
    except DataError as error:
        assert str(error).startswith(f"{file}: ")


@given(width=SIDES, height=SIDES, data=st.data())
def test_padding_keeps_a_box_where_coin_writes_it(width: int, height: int, data: st.DataObject) -> None:
    """CoIN: each coordinate of the padded picture, divided by its longer side."""
    left, right = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (left, top, right, bottom))
    side = max(width, height)
    box = [
        (left + (side - width) // 2) / side,
        (top + (side - height) // 2) / side,
        (right + (side - width) // 2) / side,
        (bottom + (side - height) // 2) / side,
    ]
    square = pad_to_square(image, BLUE)
    assert square.size == (side, side)
    red = square.getchannel("G").point(lambda green: 255 * (green == 0))
    blue = square.getchannel("R").point(lambda red: 255 * (red == 0))
    only_red = Image.composite(Image.new("L", square.size, 0), red, blue)
    assert only_red.getbbox() == tuple(round(coordinate * side) for coordinate in box)


@given(width=SIDES, height=SIDES)
def test_padding_adds_only_fill_colour_and_loses_no_pixel(width: int, height: int) -> None:
    square = pad_to_square(Image.new("RGB", (width, height), RED), BLUE)
    counts = {colour: count for count, colour in square.getcolors()}
    assert counts.pop(RED) == width * height
    assert counts in ({}, {BLUE: max(width, height) ** 2 - width * height})


@given(width=SIDES, height=SIDES)
def test_crop_is_the_centred_square_of_the_shorter_side(width: int, height: int) -> None:
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    cropped, side = centre_crop(image), min(width, height)
    assert cropped.size == (side, side)
    left, top = (width - side) // 2, (height - side) // 2
    assert abs(2 * left - (width - side)) <= 1 and abs(2 * top - (height - side)) <= 1
    assert cropped.tobytes() == image.crop((left, top, left + side, top + side)).tobytes()


@given(SIDES, SIDES, st.integers(1, 4000))
def test_a_shrunk_picture_keeps_its_proportions_and_the_limit(width: int, height: int, max_pixels: int) -> None:
    image = Image.new("RGB", (width, height))
    small = shrink(image, max_pixels)
    if width * height <= max_pixels:
        assert small is image
        return
    assert small.width * small.height <= max(max_pixels, small.width, small.height)  # a side has one pixel at least
    scale = (max_pixels / (width * height)) ** 0.5
    assert abs(small.width - max(1, width * scale)) <= 1 and abs(small.height - max(1, height * scale)) <= 1


def test_a_box_in_parts_of_the_square_stays_where_it_is() -> None:
    image = Image.new("RGB", (80, 40), "black")
    image.paste(RED, (20, 8, 60, 32))
    square = pad_to_square(image, (0, 0, 0))
    small = shrink(square, 400)
    assert small.size == (20, 20)
    boxes = [one.getchannel("R").point(lambda red: 255 * (red > 127)).getbbox() for one in (square, small)]
    assert [side / square.width for side in boxes[0]] == [side / small.width for side in boxes[1]]


LIMIT = 400
LONG = st.integers(1, 1000)


class _Processor:
    """What squaring asks of a processor."""

    tokenizer = None

    class image_processor:
        image_mean = (0.5, 0.5, 0.5)


@given(LONG, LONG, st.sampled_from(["pad", "crop"]), st.one_of(st.none(), st.integers(1, 1000)))
def test_no_square_beyond_the_limit_is_ever_made(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, geometry: Any, max_pixels: int | None
) -> None:
    """Whatever the proportions: a picture is squared within the limit, or refused by name before it is decoded."""
    file = tmp_path_factory.getbasetemp() / "strip.png"
    Image.new("RGB", (width, height), RED).save(file)
    made: list[int] = []

    def seen(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            picture = function(*args, **kwargs)
            made.append(picture.width * picture.height)
            return picture

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", LIMIT)
        patch.setattr(images.open_image, "__defaults__", (10**6,))
        patch.setattr(images.Image, "new", seen(Image.new))
        patch.setattr(Image.Image, "resize", seen(Image.Image.resize))
        side = min(width, height) if geometry == "crop" else max(width, height)
        wanted = side * side if max_pixels is None else min(side * side, max_pixels)
        encoding = Encoding(_Processor(), geometry, max_pixels)
        try:
            square = open_square(file, encoding)
        except DataError as error:
            assert wanted > 0.8 * LIMIT  # a side is rounded down
            assert str(error).startswith(f"{file}: oversized image ({width} x {height} pixels, ")
            assert "set data.max_pixels" in str(error) and not made
            assert str(error) in find_broken([(str(file), geometry, max_pixels)])[str(file)]
        else:
            assert square.width == square.height == side_of_square(file, geometry, max_pixels)
            assert square.width**2 <= min(LIMIT, side * side) and max(made, default=0) <= LIMIT
            assert find_broken([(str(file), geometry, max_pixels)]) == {}


def test_too_little_memory_is_the_fault_of_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "x.png")

    def nothing_left(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_to_rgb", nothing_left)
    with pytest.raises(DataError, match=r"x\.png: too little memory to open it"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ENCODED)
def test_bytes_that_were_never_on_disk_are_the_same_picture_or_the_same_error(kind: str, tmp_path: Path) -> None:
    path, held = tmp_path / f"x.{kind.lower()}", io.BytesIO(ENCODED[kind])
    path.write_bytes(ENCODED[kind])
    assert images.size_of(held) == images.size_of(path) == (33, 21)
    assert side_of_square(held, "pad", None) == 33
    assert open_image(held).tobytes() == open_image(path).tobytes()
    with pytest.raises(DataError, match="picture: (truncated|not an image)"):
        open_image(io.BytesIO(ENCODED[kind][:20]))
