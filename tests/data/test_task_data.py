"""A sequence's data is parsed, read and hashed once, however often it is used; a draw leaves the rest."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset

from llava_cmoe.data.problems import DataError
from llava_cmoe.data.task_data import TaskData, held_out_rows, subsample
from llava_cmoe.evaluation.eval_spec import eval_spec_of
from llava_cmoe.settings.data import DataSettings
from llava_cmoe.settings.evaluation import EvaluationSettings
from llava_cmoe.settings.recipes import parse_settings


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened since."""
    counts: Counter[str] = Counter()
    plain = Path.open

    def counting(path: Path, *args: Any, **kwargs: Any) -> Any:
        counts[str(path)] += 1
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting)
    return counts


def settings_of(root: Path, **changes: Any) -> DataSettings:
    return DataSettings(sequence=str(root / "sequence.yaml"), root=root, **changes)


def test_everything_is_read_once_however_often_it_is_used(tiny_data: Path, opened: Counter[str]):
    data = TaskData.open(settings_of(tiny_data, train_rows=5), seed=0)
    yaml = str(tiny_data / "sequence.yaml")
    assert dict(opened) == {yaml: 1}  # nothing is read before it is wanted
    for _ in range(3):
        data.check(reads_images=True)
        assert data.train["colours"] is data.train["colours"] and data.evaluate["sides"] is data.evaluate["sides"]
        assert len(data.files) == 4 and len(data.fingerprint) == 64
        assert len(data.held_out("sides")) == tiny.NUM_TRAIN - 5
        data.encoding(data.sequence.tasks[0], processor=None)
    files = [str(tiny_data / name) for name in data.files]
    assert dict(opened) == {yaml: 1, **dict.fromkeys(files, 2)}  # its rows, and its hash


def test_only_the_chosen_tasks_are_read(tiny_data: Path, opened: Counter[str]):
    data = TaskData.open(settings_of(tiny_data, tasks=("sides",)), seed=0)
    data.check(reads_images=True)
    assert list(data.train) == list(data.evaluate) == list(data.sequence.names) == ["sides"]
    assert not any("colours" in path for path in opened)


def test_hashes_need_no_rows(tiny_data: Path, opened: Counter[str]):
    data = TaskData.open(settings_of(tiny_data), seed=0)
    assert data.fingerprint == TaskData.open(settings_of(tiny_data, train_rows=1), seed=1).fingerprint
    assert set(opened.values()) == {2}  # two sequences parsed, each file hashed for each of them


def test_the_seed_draws_what_is_learned_and_the_rest_is_held_out(tiny_data: Path):
    data, same, other = (TaskData.open(settings_of(tiny_data, train_rows=9), seed) for seed in (0, 0, 1))
    learned, held_out = (set(rows["id"]) for rows in (data.train["sides"], data.held_out("sides")))
    assert len(learned) == 9 and len(held_out) == tiny.NUM_TRAIN - 9 and not learned & held_out
    assert data.train["sides"]["id"][:] == same.train["sides"]["id"][:] != other.train["sides"]["id"][:]


def test_a_picture_is_refused_where_the_backbone_reads_text_alone(tiny_data: Path):
    data = TaskData.open(settings_of(tiny_data), seed=0)
    with pytest.raises(DataError, match=r"colours/train\.json, row 0 .*it shows a picture"):
        data.check(reads_images=False)


def test_a_draw_of_rows_is_seeded_and_a_short_file_is_taken_whole():
    rows = Dataset.from_dict({"id": list(range(20))})
    drawn = subsample(rows, 5, seed=3)
    assert len(set(drawn["id"])) == 5
    assert drawn["id"][:] == subsample(rows, 5, seed=3)["id"][:] != subsample(rows, 5, seed=4)["id"][:]
    assert subsample(rows, None, seed=3) is rows and subsample(rows, 21, seed=3) is rows


@pytest.mark.parametrize("count", [None, 0, 5, 20, 21])
def test_what_a_draw_leaves_out_is_all_that_it_does_not_take(count: int | None):
    rows = Dataset.from_dict({"id": list(range(20))})
    taken, left = subsample(rows, count, seed=3)["id"][:], held_out_rows(rows, count, seed=3)["id"][:]
    assert sorted([*taken, *left]) == list(range(20))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_seed_of_a_run_is_asked_the_same_part_of_the_questions(tiny_data: Path, count: int):
    asked = [
        TaskData.open(settings_of(tiny_data, eval_rows=count), seed).evaluate["sides"]["id"][:] for seed in range(4)
    ]
    assert len(asked[0]) == count and all(ids == asked[0] for ids in asked)
    others = [
        TaskData.open(settings_of(tiny_data, eval_rows=count, eval_seed=own), 0).evaluate["sides"]["id"][:]
        for own in range(1, 9)
    ]
    assert any(ids != asked[0] for ids in others)


def test_a_run_older_than_the_setting_is_asked_what_its_own_seed_drew(tiny_data: Path):
    older = parse_settings(
        DataSettings, settings_of(tiny_data, eval_rows=3).model_dump(exclude={"eval_seed"}), "run.json", recorded=True
    )
    assert older.eval_seed is None
    for seed in range(3):
        asked = TaskData.open(older, seed).evaluate["colours"]["id"][:]
        whole = TaskData.open(settings_of(tiny_data), seed).evaluate["colours"]
        assert asked == subsample(whole, 3, seed)["id"][:]


@pytest.mark.parametrize(("count", "marked"), [(3, True), (tiny.NUM_EVAL, False), (None, False)])
def test_a_draw_of_the_questions_is_a_subset_and_all_of_them_are_none(
    tiny_data: Path, count: int | None, marked: bool, tmp_path: Path
):
    data = TaskData.open(settings_of(tiny_data, eval_rows=count), seed=7)
    subset = eval_spec_of(data, EvaluationSettings(), tmp_path).subset
    assert (subset is not None) == marked
    if subset is not None:
        assert (subset.limit, subset.seed, subset.by) == (count, 0, "data.eval_rows")
        assert subset.of == {"colours": tiny.NUM_EVAL, "sides": tiny.NUM_EVAL}
