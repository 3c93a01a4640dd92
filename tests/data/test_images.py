"""Pictures open upright as RGB or fail with a reason; squares keep boxes where CoIN's Grounding puts them."""

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_cmoe.data.images import centre_crop, open_image, pad_to_square, shrink
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
