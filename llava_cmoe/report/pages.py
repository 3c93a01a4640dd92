"""What all pages share: colours and tables, shades for any eye, the policy of a page that is one file, templates."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib import colormaps
from matplotlib.colors import to_hex

from llava_cmoe.report.figures import COLOURS
from llava_cmoe.report.page_grids import STEPS

HERE = Path(__file__).parent


@cache
def template_of(file: Path) -> Template:
    """A template that escapes whatever it is given; it may use those of this folder."""
    environment = Environment(loader=FileSystemLoader([file.parent, HERE]), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(file.name)


@cache
def style_of(*files: Path) -> str:
    """The base that all pages share, what these files add, and a class for each shade."""
    return "".join(path.read_text(encoding="utf-8") for path in (HERE / "base.css", *files)) + _shades()


def policy_of(style: str, script: str | None = None) -> str:
    """The policy of a page that is one file: this style and this script run, nothing is loaded but its own pictures."""
    allowed = {"style": style, "script": script}
    hashes = [
        f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for kind, text in allowed.items()
        if text is not None
    ]
    return "; ".join(("default-src 'none'", "img-src data:", *hashes, "base-uri 'none'", "form-action 'none'"))


def _shades() -> str:
    """A class for each step from pale to dark, with whichever ink is read better on it."""
    rules = []
    for step in range(STEPS + 1):
        red, green, blue, _ = colormaps[COLOURS](step / STEPS)
        ink = "#ffffff" if contrast(1.0, luminance(red, green, blue)) > 4.5 else "#000000"
        rules.append(f".s{step} {{ background: {to_hex((red, green, blue))}; color: {ink}; }}")
    return "\n".join((*rules, ""))


def luminance(red: float, green: float, blue: float) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2 defines it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: float, other: float) -> float:
    """Contrast ratio of two luminances, 1 to 21; 4.5 is what WCAG 2 asks of text."""
    lighter, darker = max(one, other), min(one, other)
    return (lighter + 0.05) / (darker + 0.05)
