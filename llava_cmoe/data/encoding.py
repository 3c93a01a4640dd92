"""Canonical rows as token samples: opens the picture, makes it square, applies the chat template.

Batches are made by `collator.py`; which tokens of a conversation are learned is decided in `conversation.py`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava_cmoe.data.conversation import check_length, count_tokens, encode_prompt, encode_sample, tokenizer_of
from llava_cmoe.data.images import (
    PictureFile,
    centre_crop,
    name_of,
    open_image,
    pad_to_square,
    shrink,
    side_of_square,
)
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.rows import MARKER, Turn
from llava_cmoe.data.tasks import Geometry
from llava_cmoe.provenance.fingerprints import fingerprint_file

SMALL, LARGE = 64, 1024
"""Sides of squares, in pixels, that become equally many tokens only if all do."""


@dataclass(frozen=True)
class Encoding:
    """How rows of a task become tensors.

    Attributes:
        processor: the backbone's.
        geometry: how a picture becomes square.
        max_pixels: largest picture that the processor is given; any when None.
        keep: keep a row in memory once encoded (43 kB for a picture of 60 pixels, 1.3 MB for one of 336): small
            sequences pass over their data several times. Every worker process of a data loader keeps rows of its own.
    """

    processor: Any
    geometry: Geometry = "pad"
    max_pixels: int | None = None
    keep: bool = False


class EncodedRows(Dataset[dict[str, Tensor]], ABC):
    """Canonical rows, encoded when they are read."""

    def __init__(self, rows: datasets.Dataset, encoding: Encoding) -> None:
        self.rows, self.encoding = rows, encoding
        self._kept: dict[int, dict[str, Tensor]] | None = {} if encoding.keep else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self._kept is None:
            return self._encoded(index)
        if index not in self._kept:
            self._kept[index] = self._encoded(index)
        return dict(self._kept[index])

    def id_of(self, index: int) -> str:
        """A row's id."""
        row_id: str = self.rows[index]["id"]
        return row_id

    def check_pictures(self, file: Path) -> None:
        """Raise for the first row whose picture is none or cannot be squared; files' headers are read, nothing decoded.

        Args:
            file: where the rows come from, for the error.

        Raises:
            DataError: names the file, the row's id, the picture and what is wrong with it.
        """
        seen = set[str | None]([None])
        for row_id, picture in zip(self.rows["id"], self.rows["image"], strict=True):
            if picture in seen:
                continue
            seen.add(picture)
            try:
                side_of_square(Path(picture), self.encoding.geometry, self.encoding.max_pixels)
            except DataError as error:
                raise DataError(Problem(file, str(error), row_id=row_id)) from error

    def _encoded(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        image = None
        if row["image"] is not None:
            image = open_square(Path(row["image"]), self.encoding)
        try:
            return self.encode(row["turns"], image)
        except ValueError as error:
            raise ValueError(f"row {index} (id {row['id']}): {error}") from error
        except MemoryError as error:
            reason = "too little memory to encode it; make its picture smaller (data.max_pixels)"
            raise ValueError(f"row {index} (id {row['id']}): {reason}") from error

    @abstractmethod
    def encode(self, turns: list[Turn], image: Image.Image | None) -> dict[str, Tensor]:
        """The row's tokens."""


class SampleRows(EncodedRows):
    """Whole conversations with labels, to learn from; one longer than `max_length` tokens is an error."""

    def __init__(self, rows: datasets.Dataset, encoding: Encoding, max_length: int) -> None:
        super().__init__(rows, encoding)
        self.max_length = max_length

    def encode(self, turns: list[Turn], image: Image.Image | None) -> dict[str, Tensor]:
        """The conversation's tokens and labels."""
        return encode_sample(self.encoding.processor, turns, image, self.max_length)

    def kinds(self) -> list[tuple[bool, int]]:
        """Per row, whether it has a picture and how many characters its turns have, which orders rows as tokens do.

        Some microseconds a row; counting tokens would be a millisecond, and a picture's are the same in all rows.
        """
        texts = (sum(len(turn["text"]) for turn in turns) for turns in self.rows["turns"])
        return [(image is not None, length) for image, length in zip(self.rows["image"], texts, strict=True)]

    def check_lengths(self, file: Path) -> None:
        """Raise a DataError for the first of `too_long`, before hours of training reach it."""
        for problem in self.too_long(file):
            raise DataError(problem)

    def too_long(self, file: Path) -> Iterator[Problem]:
        """Samples that are too long, or whose picture cannot be squared: the row's id, its length and the limit.

        No picture is decoded: a grey square stands for all of its size, or for all where a small and a large one become
        equally many tokens, as LLaVA-1.5's do.

        Args:
            file: where the rows come from.
        """
        tokens, side_of = cache(self._tokens_of_a_square), cache(self._side_of)
        some_pictures = any(path is not None for path in self.rows["image"])
        sizes_matter = some_pictures and tokens(SMALL) != tokens(LARGE)
        for row in self.rows:
            try:
                side = SMALL if row["image"] is None else side_of(row["image"])
                image_tokens = 0 if row["image"] is None else tokens(side if sizes_matter else SMALL)
                check_length(count_tokens(self.encoding.processor, row["turns"], image_tokens), self.max_length)
            except ValueError as error:
                # No index: these rows may be a draw of the file's.
                yield Problem(file, str(error), row_id=row["id"])

    def _side_of(self, picture: str) -> int:
        return side_of_square(Path(picture), self.encoding.geometry, self.encoding.max_pixels)

    def _tokens_of_a_square(self, side: int) -> int:
        """Tokens that the marker becomes for a square picture, less the one of its placeholder."""
        turns: list[Turn] = [{"role": "user", "text": MARKER}]
        grey = encode_prompt(self.encoding.processor, turns, Image.new("RGB", (side, side)))
        return len(grey["input_ids"]) - count_tokens(self.encoding.processor, turns, image_tokens=0)


class PromptRows(EncodedRows):
    """First questions without answers, to generate from or to locate by."""

    def fingerprint(self) -> str:
        """sha256 over all that the prompts are made of, the processor apart: questions, pictures, geometry.

        Reads every picture's file, but decodes none.
        """
        picture = cache(lambda path: fingerprint_file(Path(path)))
        digest = hashlib.sha256(json.dumps([self.encoding.geometry, self.encoding.max_pixels]).encode())
        for row in self.rows:
            seen = None if row["image"] is None else picture(row["image"])
            digest.update(json.dumps([row["turns"][:1], seen]).encode())
        return digest.hexdigest()

    def encode(self, turns: list[Turn], image: Image.Image | None) -> dict[str, Tensor]:
        """The tokens of the first question and the generation prompt."""
        return encode_prompt(self.encoding.processor, turns[:1], image)


def open_square(path: PictureFile, encoding: Encoding) -> Image.Image:
    """Open a picture and make it square, as the processor's model expects it, and not larger than `max_pixels`.

    Padding has the colour of the image processor's mean, which normalising turns into zeros (as in LLaVA).

    Raises:
        DataError: errors of `open_image` and of `side_of_square`; or the backbone reads text alone.
    """
    if tokenizer_of(encoding.processor) is encoding.processor:
        raise DataError(Problem(name_of(path), "a picture, and the backbone reads text alone"))
    side = side_of_square(path, encoding.geometry, encoding.max_pixels)  # before anything is decoded
    image = open_image(path)
    if encoding.geometry == "crop":
        square = centre_crop(image)
        return square if encoding.max_pixels is None else shrink(square, encoding.max_pixels)
    red, green, blue = (int(255 * mean) for mean in encoding.processor.image_processor.image_mean)
    return pad_to_square(image, (red, green, blue), side)
