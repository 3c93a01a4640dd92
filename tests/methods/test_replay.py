"""Replay: which rows are kept, and how often they are read."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from formulas import data_of, restored
from tiny import NUM_TRAIN, Lesson

from llava_cmoe.data.collator import ROW
from llava_cmoe.methods.replay import kept_rows
from llava_cmoe.records import StageReport
from llava_cmoe.runs.stage import fit_fn


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("replay")


@pytest.mark.parametrize(
    ("num_rows", "fraction", "num_kept"), [(24, 0.1, 2), (1000, 0.25, 250), (3, 0.01, 1), (5, 1, 5)]
)
def test_the_kept_rows_are_the_same_whenever_asked_and_at_least_one(num_rows: int, fraction: float, num_kept: int):
    kept = kept_rows(num_rows, fraction, "0/0")
    assert kept == kept_rows(num_rows, fraction, "0/0") == sorted(set(kept))
    assert len(kept) == num_kept and set(kept) <= set(range(num_rows))


def test_other_tasks_and_seeds_keep_other_rows():
    drawn = {tuple(kept_rows(1000, 0.01, seed)) for seed in ("0/0", "0/1", "1/0")}
    assert len(drawn) == 3


def test_a_task_is_learned_with_the_kept_rows_of_the_one_before(lesson: Lesson):
    method, data, given = restored(lesson, 1), data_of(lesson, 1), []

    def fit(samples: Any, *args: Any, **kwargs: Any) -> StageReport:
        given.extend(samples[place] for place in range(len(samples)))
        return StageReport(1, len(samples), 0.0, 0.0, 0.0)

    learned = method.learn(data, fit)
    old = [data_of(lesson, 0).samples[row] for row in kept_rows(NUM_TRAIN, 0.1, f"{lesson.recipe.seed}/0")]
    expected = [data.samples[row] for row in range(NUM_TRAIN)] + old
    assert len(given) == len(expected) == NUM_TRAIN + learned.facts["replayed_rows"] == NUM_TRAIN + 2
    assert all(torch.equal(row["input_ids"], other["input_ids"]) for row, other in zip(given, expected, strict=True))


def test_every_kept_row_is_read_once_an_epoch_among_the_new_ones(lesson: Lesson):
    run, data, steps = replace(lesson.run, method=restored(lesson, 1)), data_of(lesson, 1), []
    fit = fit_fn(run, data, lambda *_: None)

    def seeing(samples: Any, training_context: Any, **kwargs: Any) -> StageReport:
        @contextmanager
        def seen(batch: Any) -> Iterator[Any]:
            steps.append(batch[ROW].tolist())
            with training_context(batch) as extra_loss:
                yield extra_loss

        return fit(samples, seen, epochs=2.0, **kwargs)

    run.method.learn(data, seeing)
    read = Counter(row for step in steps for row in step)
    assert read == dict.fromkeys(range(NUM_TRAIN + 2), 2)
    half = len(steps) // 2
    assert Counter(row for step in steps[:half] for row in step) == dict.fromkeys(range(NUM_TRAIN + 2), 1)
    places = [number for number, step in enumerate(steps) if any(row >= NUM_TRAIN for row in step)]
    assert places != [half - 1, 2 * half - 1]  # among the new ones, not behind them


def test_the_first_task_has_nothing_to_replay(lesson: Lesson):
    first, second = lesson.run.registry.records()
    assert first.facts["replayed_rows"] == 0 and first.facts["training"]["samples"] == NUM_TRAIN
    assert second.facts["replayed_rows"] == 2 and second.facts["training"]["samples"] == NUM_TRAIN + 2
