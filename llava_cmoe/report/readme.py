"""Generated parts of a Markdown file: written between two comments, everything else left as it is."""

from __future__ import annotations

from pathlib import Path


def markers(name: str) -> tuple[str, str]:
    """The comments around a generated part."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write_between(file: Path, name: str, text: str) -> None:
    """Replace one generated part of a Markdown file.

    Raises:
        ValueError: the file has no such part; it is left alone.
    """
    first, last = markers(name)
    before, begin, rest = file.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not end:
        raise ValueError(f"{file}: no {first} and {last} to write the text between")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
