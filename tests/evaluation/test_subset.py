"""A subset is a part of the rows that keeps the shares of question types and answers, and hangs on its seed alone."""

from collections import Counter

import pytest
from datasets import Dataset

from llava_cmoe.data.rows import EVAL_FEATURES
from llava_cmoe.evaluation.subset import stratified, stratum

KINDS = {("Is this", "yes"): 500, ("Is this", "no"): 300, ("How many", "2"): 150, ("What is", "cat"): 50}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    made = [
        {
            "id": f"{begin}/{answer}/{number}", "image": None, "answer": answer,
            "answers": [], "box": [], "size": [], "choices": [],
            "turns": [{"role": "user", "text": f"<image>\n{begin} number {number}?"}],
        }
        for (begin, answer), count in KINDS.items()
        for number in range(count)
    ]  # fmt: skip
    return Dataset.from_list(made, features=EVAL_FEATURES).shuffle(seed=1)


@pytest.mark.parametrize("limit", [20, 100, 333])
def test_every_kind_keeps_its_share_to_within_one(rows: Dataset, limit: int) -> None:
    drawn = stratified(rows, limit, seed=0)
    counts = Counter(stratum(row["turns"][0]["text"], row["answer"]) for row in drawn)
    assert len(set(drawn["id"])) == limit
    for (begin, answer), count in KINDS.items():
        assert abs(counts[begin.casefold(), answer] - count * limit / 1000) < 1


def test_rows_stay_in_their_order(rows: Dataset) -> None:
    place = {row_id: number for number, row_id in enumerate(rows["id"])}
    drawn = [place[row_id] for row_id in stratified(rows, 50, seed=0)["id"]]
    assert drawn == sorted(drawn)


def test_the_seed_decides(rows: Dataset) -> None:
    first, again, other = (stratified(rows, 50, seed)["id"][:] for seed in (3, 3, 4))
    assert first == again != other


def test_every_row_has_the_same_chance(rows: Dataset) -> None:
    drawn = Counter(row_id for seed in range(100) for row_id in stratified(rows, 100, seed)["id"][:])
    assert sum(drawn.values()) == 100 * 100 and max(drawn.values()) < 28  # 10 expected


def test_all_rows_where_no_more_exist_or_none_is_asked_for(rows: Dataset) -> None:
    assert stratified(rows, None, 0) is rows and stratified(rows, 1000, 0) is rows
