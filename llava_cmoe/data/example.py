"""One row as the model sees it: its tokens as text, what is learned marked, a picture's tokens counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text

from llava_cmoe.data.conversation import IGNORED, encode_sample, tokenizer_of
from llava_cmoe.data.encoding import Encoding, open_square
from llava_cmoe.data.rows import TrainRow

REPEATED = 4
"""A token that stands this often in a row is told once, with its number: a picture's, of which there are hundreds."""

UNLIMITED = 10**9


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a sample that are all learned, or all not."""

    text: str
    tokens: int
    learned: bool


def pieces_of(row: TrainRow, encoding: Encoding) -> tuple[Piece, ...]:
    """A training row, encoded exactly as for training.

    Raises:
        DataError: its picture cannot be opened.
        ValueError: the chat template cannot be used.
    """
    processor = encoding.processor
    image = None if row["image"] is None else open_square(Path(row["image"]), encoding)
    encoded = encode_sample(processor, row["turns"], image, UNLIMITED)
    marked = zip(encoded["input_ids"].tolist(), (encoded["labels"] != IGNORED).tolist(), strict=True)
    pieces = []
    for learned, group in groupby(marked, key=lambda pair: pair[1]):
        ids = [token for token, _ in group]
        pieces.append(Piece("".join(_decoded(ids, tokenizer_of(processor))), len(ids), learned))
    return tuple(pieces)


def _decoded(ids: list[int], tokenizer: Any) -> Iterator[str]:
    plain: list[int] = []
    for token, group in groupby(ids):
        count = len(list(group))
        if count < REPEATED:
            plain += [token] * count
            continue
        yield tokenizer.decode(plain)
        yield f"{tokenizer.decode([token])} x {count}"
        plain = []
    yield tokenizer.decode(plain)


def render_pieces(pieces: Iterable[Piece]) -> Text:
    """The pieces one after the other; what is learned stands in marks that need no colours."""
    text = Text()
    for piece in pieces:
        text.append(f"⟦{piece.text}⟧" if piece.learned else piece.text, style="bold green" if piece.learned else "")
    return text
