"""The drawn world of the pocket sequence: things, signs and books, described as values and rendered with Pillow.

What is asked about the pictures is `pocket.py`'s business, what is told about them `pocket_captions.py`'s.
Every random choice comes from the `random.Random` that is passed in, so a seed makes pictures byte-identical.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from llava_cmoe.pocket.drawings import OBJECTS, SHAPES, Polygon

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (245, 215, 30),
    "green": (40, 150, 60),
    "blue": (35, 85, 210),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
    "white": (252, 252, 252),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (186, 186, 186),
    "pink": (246, 196, 206),
    "mint": (178, 226, 204),
    "sand": (222, 200, 160),
    "sky": (170, 205, 240),
}
SIGN_WORDS = (
    "stop open taxi exit cafe bank hotel park sale bus pizza bar zoo gym milk fire police school market museum "
    "library garage bakery river beach north south east west danger slow wet push pull free news post music film tea"
).split()
TITLE_FIRST = "Silent Golden Broken Hidden Frozen Wild Little Last Lost Dark Bright Secret".split()
TITLE_SECOND = "River Garden Winter Island Mirror Forest Kingdom Letter Shadow Summer Bridge Ocean Storm Tower".split()
AUTHORS = "A. Moss|B. Stone|C. Hill|D. Lake|E. Frost|A. Wood|B. Marsh|C. Field|D. Brook|E. Rose|A. Dale|B. Snow".split(
    "|"
)
GENRES = {
    "romance": "heart",
    "fantasy": "star",
    "mystery": "key",
    "travel": "boat",
    "cooking": "mug",
    "science": "rocket",
}


CATEGORIES: dict[str, tuple[str, ...]] = {
    "vehicle": ("car", "boat", "rocket"),
    "plant": ("tree", "flower", "cactus"),
    "animal": ("fish",),
    "food": ("apple", "mushroom"),
    "building": ("house",),
    "container": ("mug", "bottle", "envelope"),
    "instrument": ("guitar", "bell"),
    "furniture": ("chair", "lamp"),
}


@dataclass(frozen=True)
class Canvas:
    """A picture's size in pixels and its background colour's name."""

    width: int
    height: int
    background: str

    @property
    def side(self) -> int:
        """Side of the padded square in pixels."""
        return max(self.width, self.height)


@dataclass(frozen=True)
class Thing:
    """One drawn thing: what, in which colour, and where (pixels of the unpadded picture)."""

    kind: str
    colour: str
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def centre(self) -> tuple[float, float]:
        """Centre in pixels."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    @property
    def name(self) -> str:
        """Colour and kind, as captions and questions name it."""
        return f"{self.colour} {self.kind}"

    def box(self, canvas: Canvas) -> tuple[float, float, float, float]:
        """The box (x1, y1, x2, y2) on the centred padded square, each a fraction of its side, two decimals."""
        left, top, side = (canvas.side - canvas.width) / 2, (canvas.side - canvas.height) / 2, canvas.side
        corners = ((self.x0 + left), (self.y0 + top), (self.x1 + left), (self.y1 + top))
        x0, y0, x1, y1 = (round(value / side, 2) for value in corners)
        return x0, y0, x1, y1


@dataclass(frozen=True)
class Scene:
    """One to four things, from left to right, that do not overlap."""

    canvas: Canvas
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class ObjectView:
    """One object in some pose; `flaw` is how badly it was photographed: clear, blurred, dark, cut or unreadable."""

    canvas: Canvas
    kind: str
    colour: str
    scale: float
    turn: float
    mirrored: bool
    shift: tuple[float, float]
    pattern: str
    flaw: str = "clear"


@dataclass(frozen=True)
class Sign:
    """A coloured board with one word, on a pole or on a wall; `flaw` is how badly it was photographed."""

    canvas: Canvas
    word: str
    colour: str
    width: float
    shift: tuple[float, float]
    flaw: str = "clear"


@dataclass(frozen=True)
class Book:
    """A book's cover: a title of two words, an author, and a genre told by its emblem."""

    canvas: Canvas
    first: str
    second: str
    author: str
    genre: str
    colour: str

    @property
    def title(self) -> str:
        """Both words of the title."""
        return f"{self.first} {self.second}"


def random_canvas(rng: Random, low: float = 0.7, high: float = 1.43) -> Canvas:
    """A picture of 100 to 180 pixels on its longer side; `low`, `high` bound width / height."""
    side, ratio = rng.randint(100, 180), math.exp(rng.uniform(math.log(low), math.log(high)))
    width, height = (side, round(side / ratio)) if ratio >= 1 else (round(side * ratio), side)
    return Canvas(width, height, rng.choice(list(BACKGROUNDS)))


def random_scene(rng: Random, most: int = 4) -> Scene:
    """One to `most` things of distinct colour and kind pairs, apart from each other by their placement."""
    canvas, things = random_canvas(rng), list[Thing]()
    wanted, short = rng.randint(1, most), min(canvas.width, canvas.height)
    for _ in range(60):
        if len(things) == wanted:
            break
        side = short * (rng.uniform(0.22, 0.3) if rng.random() < 0.5 else rng.uniform(0.34, 0.46))
        x0, y0 = rng.uniform(1, canvas.width - side - 1), rng.uniform(1, canvas.height - side - 1)
        thing = Thing(rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), x0, y0, x0 + side, y0 + side)
        apart = all(x0 > t.x1 + 3 or x0 + side < t.x0 - 3 or y0 > t.y1 + 3 or y0 + side < t.y0 - 3 for t in things)
        if apart and all((thing.kind, thing.colour) != (t.kind, t.colour) for t in things):
            things.append(thing)
    return Scene(canvas, tuple(sorted(things, key=lambda t: t.centre[0])))


def random_object(rng: Random, flaws: tuple[str, ...] = ("clear",)) -> ObjectView:
    """One of the objects in a random pose, colour, background and flaw."""
    return ObjectView(
        canvas=random_canvas(rng),
        kind=rng.choice(list(OBJECTS)),
        colour=rng.choice(list(COLOURS)),
        scale=rng.uniform(0.55, 0.85),
        turn=rng.uniform(-25, 25),
        mirrored=rng.random() < 0.5,
        shift=(rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12)),
        pattern=rng.choice(("plain", "stripes", "dots")),
        flaw=rng.choice(flaws),
    )


def random_sign(rng: Random) -> Sign:
    """A sign with one of `SIGN_WORDS`."""
    shift = (rng.uniform(-0.06, 0.06), rng.uniform(-0.15, 0.15))
    return Sign(
        random_canvas(rng, 0.9, 1.5), rng.choice(SIGN_WORDS), rng.choice(list(COLOURS)), rng.uniform(0.75, 0.88), shift
    )


def random_book(rng: Random) -> Book:
    """A cover with a title, an author and a genre's emblem."""
    canvas = random_canvas(rng, 0.7, 0.85)
    words = rng.choice(TITLE_FIRST), rng.choice(TITLE_SECOND), rng.choice(AUTHORS)
    return Book(canvas, *words, rng.choice(list(GENRES)), rng.choice(list(COLOURS)))


def render(view: Scene | ObjectView | Sign | Book) -> Image.Image:
    """Draw any view as an RGB picture of its canvas's size."""
    image = Image.new("RGB", (view.canvas.width, view.canvas.height), BACKGROUNDS[view.canvas.background])
    match view:
        case Scene():
            for thing in view.things:
                _draw(image, SHAPES[thing.kind], thing.colour, (thing.x0, thing.y0), thing.x1 - thing.x0)
        case ObjectView():
            image = _photographed(_render_object(image, view), view.flaw, min(image.size) * view.scale / 28)
        case Sign():
            image = _photographed(_render_sign(image, view), view.flaw, view.width * image.width / 80)
        case Book():
            _render_book(image, view)
    return image


def _paint(slot: str, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    shades = {"m": colour, "k": (20, 20, 20), "w": (250, 250, 250)}
    if slot in shades:
        return shades[slot]
    towards, share = (0, 0.35) if slot == "d" else (255, 0.55)
    red, green, blue = (round(value + (towards - value) * share) for value in colour)
    return red, green, blue


def _draw(
    image: Image.Image,
    polygons: list[Polygon],
    colour: str,
    corner: tuple[float, float],
    side: float,
    turn: float = 0,
    mirrored: bool = False,
) -> None:
    """Draw polygons of the unit square at `corner` with `side` pixels, turned by degrees about their centre."""
    draw, sine, cosine = ImageDraw.Draw(image), math.sin(math.radians(turn)), math.cos(math.radians(turn))
    for slot, outline in polygons:
        points = []
        for x, y in outline:
            dx, dy = (0.5 - x if mirrored else x - 0.5), y - 0.5
            points.append(
                (corner[0] + side * (0.5 + dx * cosine - dy * sine), corner[1] + side * (0.5 + dx * sine + dy * cosine))
            )
        draw.polygon(points, fill=_paint(slot, COLOURS[colour]))


def _render_object(image: Image.Image, view: ObjectView) -> Image.Image:
    width, height = image.size
    draw, shade = ImageDraw.Draw(image), _paint("l", BACKGROUNDS[view.canvas.background])
    if view.pattern == "stripes":
        for x in range(0, width, 16):
            draw.rectangle((x, 0, x + 7, height), fill=shade)
    elif view.pattern == "dots":
        for x in range(6, width, 18):
            for y in range(6, height, 18):
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=shade)
    side = min(width, height) * view.scale
    reach = 0.38 if view.flaw == "cut" else 0.0  # a cut-off object leaves the picture on the side it is shifted to
    dx, dy = ((shift + math.copysign(reach, shift) * (axis == 0)) for axis, shift in enumerate(view.shift))
    corner = width / 2 - side / 2 + dx * width, height / 2 - side / 2 + dy * height
    _draw(image, OBJECTS[view.kind], view.colour, corner, side, view.turn, view.mirrored)
    return image


def _photographed(image: Image.Image, flaw: str, blur: float) -> Image.Image:
    """The picture as someone took it who does not see; of `blur` pixels, an unreadable one of ten times as many."""
    if flaw == "blurred":
        return image.filter(ImageFilter.GaussianBlur(blur))
    if flaw == "dark":
        return image.point(lambda value: int(value * 0.4))
    if flaw == "unreadable":
        return image.filter(ImageFilter.GaussianBlur(10 * blur)).point(lambda value: int(value * 0.25))
    return image


def _text(
    image: Image.Image, text: str, centre: tuple[float, float], width: float, fill: tuple[int, int, int], tallest: float
) -> None:
    """Write `text` about `centre`, as large as `width` and `tallest` (pixels) allow."""
    probe = ImageFont.load_default(size=40)
    box = probe.getbbox(text)
    size = max(6, int(40 * min(width / (box[2] - box[0]), tallest / (box[3] - box[1]))))
    ImageDraw.Draw(image).text(
        centre,
        text,
        fill=fill,
        font=ImageFont.load_default(size=size),
        anchor="mm",
        stroke_width=size // 24,
        stroke_fill=fill,
    )


def _ink(colour: str) -> tuple[int, int, int]:
    """Black or white, whichever stands out from `colour`."""
    red, green, blue = COLOURS[colour]
    return COLOURS["black"] if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else COLOURS["white"]


def _render_sign(image: Image.Image, sign: Sign) -> Image.Image:
    width, height = image.size
    x, y = width * (0.5 + sign.shift[0]), height * (0.45 + sign.shift[1])
    half, tall = width * sign.width / 2, width * 0.17
    draw = ImageDraw.Draw(image)
    draw.rectangle((x - 3, y, x + 3, height), fill=(90, 70, 50))
    draw.rectangle((x - half, y - tall, x + half, y + tall), fill=COLOURS[sign.colour], outline=(60, 60, 60), width=2)
    _text(image, sign.word.upper(), (x, y), half * 1.8, _ink(sign.colour), tall * 1.35)
    return image


def _render_book(image: Image.Image, book: Book) -> None:
    width, height = image.size
    ImageDraw.Draw(image).rectangle(
        (3, 2, width - 4, height - 3), fill=COLOURS[book.colour], outline=(60, 60, 60), width=2
    )
    ink = _ink(book.colour)
    for text, level in ((book.first, 0.13), (book.second, 0.31), (book.author, 0.9)):
        _text(image, text, (width / 2, height * level), width * 0.84, ink, height * 0.14)
    emblem = "white" if ink == COLOURS["white"] else "black"
    side = height * 0.34
    _draw(image, {**SHAPES, **OBJECTS}[GENRES[book.genre]], emblem, (width / 2 - side / 2, height * 0.43), side)
