"""Steps read rows of one kind and like length, every row once an epoch, in an order that seed and epoch decide."""

import pytest
import torch
from datasets import Dataset as Table
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from llava_cmoe.data.collator import ROW
from llava_cmoe.data.encoding import Encoding, SampleRows
from llava_cmoe.data.rows import MARKER, TRAIN_FEATURES
from llava_cmoe.training.order import LengthGroupedSampler, NumberedRows, kinds_of

STEP = 4
KINDS = [(row % 3 > 0, 10 + 37 * row % 90) for row in range(62)]  # 41 with a picture, 21 without


def order(seed: int = 0, epoch: int = 0) -> list[int]:
    rows = LengthGroupedSampler(KINDS, STEP, seed)
    rows.set_epoch(epoch)
    return list(rows)


def steps_of(rows: list[int]) -> list[list[int]]:
    return [rows[at : at + STEP] for at in range(0, len(rows), STEP)]


def test_every_row_comes_once_an_epoch():
    assert sorted(order()) == sorted(order(epoch=1)) == list(range(len(KINDS)))
    assert len(LengthGroupedSampler(KINDS, STEP, 0)) == 62


def test_seed_and_epoch_decide_the_order_and_nothing_else_does():
    first = order(seed=3)
    torch.manual_seed(99)
    assert order(seed=3) == first
    assert first != order(seed=4) != order(seed=4, epoch=1)


def test_all_steps_but_the_last_two_hold_one_kind():
    *steps, _, _ = steps_of(order())
    assert len(steps) == 62 // STEP - 1
    assert all(len({KINDS[row][0] for row in step}) == 1 for step in steps)
    kinds = [KINDS[step[0]][0] for step in steps]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)  # mixed, not one kind after the other


def test_rows_of_a_step_are_of_like_length():
    kinds = KINDS * 10

    def spread(rows: list[int]) -> int:
        lengths = [[kinds[row][1] for row in step] for step in steps_of(rows)]
        return sum(max(step) - min(step) for step in lengths)

    shuffled = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(0)).tolist()
    assert spread(list(LengthGroupedSampler(kinds, STEP, 0))) < 0.2 * spread(shuffled)


@pytest.mark.parametrize("count", [0, 1, STEP])
def test_few_rows_of_one_kind_are_an_order_too(count: int):
    assert sorted(LengthGroupedSampler([(True, 5)] * count, STEP, 0)) == list(range(count))


def test_rows_tell_their_kinds_unread(tiny_processor):
    answers = ["no", "yes, it is", "maybe"]
    turns = [[{"role": "user", "text": f"{MARKER}\nIs it?"}, {"role": "assistant", "text": text}] for text in answers]
    table = Table.from_dict(
        {name: [None] * 3 for name in TRAIN_FEATURES} | {"image": ["/no/such.png", None, None], "turns": turns},
        features=TRAIN_FEATURES,
    )
    rows = SampleRows(table, Encoding(tiny_processor), max_length=64)
    question = len(f"{MARKER}\nIs it?")
    assert kinds_of(rows) == [(True, question + 2), (False, question + 10), (False, question + 5)]
    assert kinds_of(Subset(Subset(rows, [2, 0]), [1])) == [(True, question + 2)]


def test_rows_carry_their_place_and_are_otherwise_what_they_were():
    plain = [{"input_ids": torch.tensor([number, 7])} for number in range(5)]
    rows = NumberedRows(ConcatDataset([plain[:2], plain[2:]]))
    assert len(rows) == 5
    for number, row in enumerate(map(rows.__getitem__, range(5))):
        assert row[ROW].tolist() == [number] and row["input_ids"].tolist() == [number, 7]
    assert not any(ROW in row for row in plain)


def test_numbered_rows_are_of_the_kinds_of_their_rows(tiny_processor):
    table = Table.from_dict(
        {name: [None] * 2 for name in TRAIN_FEATURES}
        | {"turns": [[{"role": "user", "text": text}] for text in ("Is it?", "Which one?")]},
        features=TRAIN_FEATURES,
    )
    rows = SampleRows(table, Encoding(tiny_processor), max_length=64)
    several = ConcatDataset([rows, Subset(rows, [1])])
    assert kinds_of(NumberedRows(several)) == kinds_of(several) == [(False, 6), (False, 10), (False, 10)]


def test_rows_without_kinds_are_refused():
    with pytest.raises(ValueError, match="TensorDataset has no kinds"):
        kinds_of(TensorDataset(torch.zeros(3)))
