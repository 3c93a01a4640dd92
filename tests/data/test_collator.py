"""Padding is invisible to the model, and pictures stay with their rows."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_cmoe.data.collator import ROW, Collator, dummy_image_row
from llava_cmoe.data.conversation import encode_prompt, encode_sample
from llava_cmoe.data.rows import Turn

PAD = 0


def sample(processor: Any, answer: str, colour: tuple[int, int, int] | None) -> dict[str, torch.Tensor]:
    marker, image = ("", None) if colour is None else ("<image>\n", Image.new("RGB", (24, 24), colour))
    turns: list[Turn] = [{"role": "user", "text": f"{marker}What?"}, {"role": "assistant", "text": answer}]
    return encode_sample(processor, turns, image, max_length=256)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), side=st.sampled_from(["left", "right"]))
def test_padding_goes_to_one_side_and_nothing_else_changes(lengths: list[int], side: Any) -> None:
    rows = [
        {
            "input_ids": torch.arange(1, length + 1),
            "attention_mask": torch.ones(length, dtype=torch.long),
            "labels": torch.arange(1, length + 1),
        }
        for length in lengths
    ]
    batch = Collator(pad_token_id=PAD, side=side)(rows)
    longest = max(lengths)
    for index, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        for key, fill in (("input_ids", PAD), ("attention_mask", 0), ("labels", -100)):
            assert batch[key].shape == (len(rows), longest)
            expected = torch.full((longest,), fill)
            expected[place] = rows[index][key]
            assert torch.equal(batch[key][index], expected)


def test_pictures_are_concatenated_in_the_rows_order(tiny_processor: Any) -> None:
    rows = [sample(tiny_processor, *row) for row in (("a", (255, 0, 0)), ("b", None), ("c", (0, 0, 255)))]
    batch = Collator(PAD)(rows)
    assert torch.equal(batch["pixel_values"], torch.cat([rows[0]["pixel_values"], rows[2]["pixel_values"]]))
    assert "pixel_values" not in Collator(PAD)(rows[1:2])


def test_other_outputs_of_a_processor_follow_their_kind() -> None:
    rows = [
        {
            "input_ids": torch.ones(length, dtype=torch.long),
            "token_type_ids": torch.full((length,), 7),
            "image_sizes": torch.tensor([[length, 5]]),
        }
        for length in (2, 4)
    ]
    batch = Collator(PAD)(rows)
    assert batch["token_type_ids"].tolist() == [[7, 7, 0, 0], [7, 7, 7, 7]]
    assert batch["image_sizes"].tolist() == [[2, 5], [4, 5]]


def test_pictures_of_fewer_crops_or_pixels_are_filled_with_zeros_at_the_end() -> None:
    shapes = ((1, 2, 3, 4), (1, 1, 3, 6), (1, 3, 3, 4))
    rows = [
        {"input_ids": torch.ones(2, dtype=torch.long), "pixel_values": torch.full(shape, index + 1.0)}
        for index, shape in enumerate(shapes)
    ]
    pixels = Collator(PAD)(rows)["pixel_values"]
    assert pixels.shape == (3, 3, 3, 6)
    for index, (_, crops, height, width) in enumerate(shapes):
        inside = pixels[index, :crops, :height, :width]
        assert torch.equal(inside, torch.full_like(inside, index + 1.0)) and inside.sum() == pixels[index].sum()


def test_the_loss_of_a_padded_batch_is_the_token_mean_of_its_rows(tiny_processor: Any, tiny_llava: Any) -> None:
    rows = [sample(tiny_processor, *row) for row in (("a long answer", (255, 0, 0)), ("b", None))]
    counts = [int((row["labels"] != -100).sum()) for row in rows]
    with torch.no_grad():
        alone = [tiny_llava(**Collator(PAD)([row])).loss for row in rows]
        together = tiny_llava(**Collator(PAD)(rows)).loss
    mean = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, mean)


def test_left_padded_prompts_continue_as_they_do_alone(tiny_processor: Any, tiny_llava: Any) -> None:
    image = Image.new("RGB", (24, 24), (255, 0, 0))
    prompts = [
        encode_prompt(tiny_processor, [{"role": "user", "text": "<image>\nWhat is the object in the image?"}], image),
        encode_prompt(tiny_processor, [{"role": "user", "text": "Is it?"}], None),
    ]
    collate = Collator(PAD, side="left")
    batch = collate(prompts)
    together = tiny_llava.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for index, prompt in enumerate(prompts):
        alone = tiny_llava.generate(**collate([prompt]), max_new_tokens=5, do_sample=False)
        assert torch.equal(together[index], alone[0, len(prompt["input_ids"]) :])


@pytest.mark.parametrize("length", [1, 3])
def test_places_of_rows_are_one_number_each_also_where_rows_are_of_one_token(length: int) -> None:
    rows = [{"input_ids": torch.ones(length, dtype=torch.long), ROW: torch.tensor([number])} for number in (5, 2)]
    assert Collator(PAD)(rows)[ROW].tolist() == [5, 2]


def test_a_dummy_joins_batches_without_a_picture_alone_and_nothing_of_it_is_learned(tiny_processor: Any) -> None:
    with_picture, without = (sample(tiny_processor, *row) for row in (("a", (255, 0, 0)), ("b", None)))
    for number, row in enumerate((with_picture, without)):
        row[ROW] = torch.tensor([number])
    collate = Collator(PAD, dummy=dummy_image_row(with_picture))
    assert collate([with_picture, without])[ROW].tolist() == [0, 1]
    batch = collate([without])
    assert batch[ROW].tolist() == [1, -1] and batch["input_ids"].shape[0] == 2 and len(batch["pixel_values"]) == 1
    assert not batch["attention_mask"][1].any() and (batch["labels"][1] == -100).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_one_is_the_row_itself(tiny_processor: Any, side: Any) -> None:
    row = sample(tiny_processor, "a", (0, 0, 0))
    batch = Collator(PAD, side=side)([row])
    assert batch.keys() == row.keys()
    assert all(torch.equal(batch[key], row[key] if key == "pixel_values" else row[key][None]) for key in row)
