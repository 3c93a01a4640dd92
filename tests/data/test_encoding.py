"""Rows become samples and prompts through the picture's square; kept rows are the same bits."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from llava_cmoe.data.coin import read_eval, read_train
from llava_cmoe.data.encoding import Encoding, PromptRows, SampleRows, open_square
from llava_cmoe.data.problems import DataError
from llava_cmoe.data.tasks import TaskSequence


@pytest.fixture
def rows(root: Path, sequence: TaskSequence) -> datasets.Dataset:
    return datasets.concatenate_datasets([read_train(root, task) for task in sequence.tasks])


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_padding_is_zero_for_the_model_and_the_picture_is_all_there(
    tiny_processor: Any, rows: datasets.Dataset
) -> None:
    """A 30 x 20 picture on a square: a sixth of the rows above and below is the mean colour."""
    (pixels_CHW,) = SampleRows(rows, Encoding(tiny_processor), max_length=512)[2]["pixel_values"]
    quantum = 1 / 255 / 0.26  # the mean colour is rounded down to whole bytes
    assert pixels_CHW[:, :2].abs().max() <= quantum and pixels_CHW[:, -2:].abs().max() <= quantum
    assert pixels_CHW[0, 12].min() > 0.5  # red, from the left edge to the right


def test_crop_shows_no_padding(tiny_processor: Any, rows: datasets.Dataset) -> None:
    (pixels_CHW,) = SampleRows(rows, Encoding(tiny_processor, geometry="crop"), max_length=512)[2]["pixel_values"]
    assert pixels_CHW[0].min() > 0.5


@pytest.mark.parametrize(("geometry", "side"), [("pad", 30), ("crop", 20)])
def test_open_square_gives_the_longer_or_the_shorter_side(
    tiny_processor: Any, tmp_path: Path, geometry: Any, side: int
) -> None:
    Image.new("RGB", (20, 30)).save(tmp_path / "x.png")
    assert open_square(tmp_path / "x.png", Encoding(tiny_processor, geometry)).size == (side, side)


def test_text_only_rows_have_no_picture(tiny_processor: Any, rows: datasets.Dataset) -> None:
    samples = SampleRows(rows, Encoding(tiny_processor), max_length=512)
    assert ["pixel_values" in samples[index] for index in range(len(samples))] == [True, False, True, True]


def test_kept_rows_are_bit_identical_and_read_once(root: Path, tiny_processor: Any, rows: datasets.Dataset) -> None:
    fresh, kept = (SampleRows(rows, Encoding(tiny_processor, keep=keep), max_length=512) for keep in (False, True))
    first = [kept[index] for index in range(len(kept))]
    assert all(same(first[index], fresh[index]) for index in range(len(fresh)))
    first[0].pop("labels")  # what a caller does to its dict does not reach the kept row
    for picture in (root / "cl_dataset").rglob("*.jpg"):
        picture.unlink()
    assert all("labels" in kept[index] for index in range(len(kept)))
    with pytest.raises(DataError, match="image file is missing"):
        fresh[2]


def test_prompts_of_training_and_evaluation_rows_are_first_questions(
    tiny_processor: Any, root: Path, sequence: TaskSequence, rows: datasets.Dataset
) -> None:
    encoding = Encoding(tiny_processor)
    samples, prompts = SampleRows(rows, encoding, max_length=512), PromptRows(rows, encoding)
    for index in range(len(rows)):
        length = len(prompts[index]["input_ids"])
        assert torch.equal(prompts[index]["input_ids"], samples[index]["input_ids"][:length])
        assert (samples[index]["labels"][:length] == -100).all() and samples[index]["labels"][length] != -100
    asked = PromptRows(read_eval(root, sequence.tasks[1]), encoding)[0]
    text = tiny_processor.tokenizer.decode(asked["input_ids"])
    assert text.replace("<image>" * 4, "<image>") == "<s>USER: <image>\nWhat does it say? ASSISTANT:"


def test_a_long_row_is_named_when_read_and_by_the_check_before(tiny_processor: Any, rows: datasets.Dataset) -> None:
    lengths = [len(sample["input_ids"]) for sample in SampleRows(rows, Encoding(tiny_processor), max_length=512)]
    longest = max(lengths)
    SampleRows(rows, Encoding(tiny_processor), max_length=longest).check_lengths(Path("train.json"))
    samples = SampleRows(rows, Encoding(tiny_processor), max_length=longest - 1)
    index = lengths.index(longest)
    message = rf"\(id {rows[index]['id']}\): sample of {longest} tokens; at most {longest - 1} fit"
    with pytest.raises(ValueError, match=f"row {index} {message}"):
        samples[index]
    with pytest.raises(DataError, match=rf"train\.json {message}"):
        samples.check_lengths(Path("train.json"))
