"""Intervals are those of the binomial where that is known, paired where questions are the same, and always the same."""

import numpy as np
import pytest

from llava_cmoe.evaluation.bootstrap import (
    LEVEL,
    accuracy_interval,
    interval,
    metric_intervals,
    p_value,
    resampled_means,
)
from llava_cmoe.evaluation.metrics import all_metrics


def scores(num_right: int, num_questions: int) -> list[float]:
    return [1.0] * num_right + [0.0] * (num_questions - num_right)


@pytest.mark.parametrize(("num_right", "num_questions"), [(150, 300), (30, 300), (3000, 4000)])
def test_an_interval_of_rights_and_wrongs_is_that_of_the_binomial(num_right: int, num_questions: int) -> None:
    share = num_right / num_questions
    half = 196 * np.sqrt(share * (1 - share) / num_questions)
    low, high = accuracy_interval(scores(num_right, num_questions), task=0)
    assert (low, high) == pytest.approx((100 * share - half, 100 * share + half), abs=0.15 * half)


def test_many_questions_cost_no_more_memory_than_their_distinct_scores() -> None:
    low, high = accuracy_interval([0.0, 0.3, 0.6, 0.9, 1.0] * 100_000, task=0)
    assert 55.8 < low < 56.0 < high < 56.2


def test_the_same_questions_are_drawn_in_every_column() -> None:
    column = np.random.default_rng(1).random(50)
    means_RC = resampled_means(np.stack([column, column, 1 - column], axis=1), task=3)
    assert np.array_equal(means_RC[:, 0], means_RC[:, 1])
    np.testing.assert_allclose(means_RC[:, 0] + means_RC[:, 2], 1.0)


def test_draws_are_seeded_and_tasks_are_independent() -> None:
    column_Q1 = np.array(scores(40, 100))[:, None]
    first, again, other = (resampled_means(column_Q1, task)[:, 0] for task in (0, 0, 1))
    assert np.array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.15


def test_all_right_is_a_point() -> None:
    assert accuracy_interval([1.0] * 20, task=0) == (100.0, 100.0)


def test_metrics_keep_what_questions_have_in_common() -> None:
    """Nothing changes between the stages, so the loss is exactly zero however uncertain either accuracy is."""
    same = scores(30, 60)
    found = metric_intervals({(0, 0): same, (1, 0): same, (1, 1): scores(20, 40)}, num_rows=2)
    assert found["bwt"] == (0.0, 0.0)
    assert found["last"] is not None and found["last"][0] < 50 < found["last"][1]
    assert found["transfer"] is None and found.keys() == all_metrics([]).keys()


def test_the_mean_of_two_tasks_is_surer_than_either() -> None:
    cells = {(0, 0): scores(50, 100), (1, 0): scores(50, 100), (1, 1): scores(50, 100)}
    mean, one = metric_intervals(cells, num_rows=2)["last"], accuracy_interval(cells[1, 0], task=0)
    assert mean is not None
    assert (mean[1] - mean[0]) / (one[1] - one[0]) == pytest.approx(0.5**0.5, abs=0.08)


def test_a_metric_that_was_not_measured_has_no_interval() -> None:
    found = metric_intervals({(1, 0): scores(1, 2), (1, 1): scores(1, 2)}, num_rows=2)
    assert found["last"] is not None and found["immediate"] is None


def test_p_is_small_where_a_difference_is_sure_and_one_where_there_is_none() -> None:
    sure, none = np.full(1000, 3.0), np.zeros(1000)
    assert p_value(sure) == p_value(-sure) == pytest.approx(2 / 1001)
    assert p_value(none) == 1.0
    assert p_value(np.linspace(-1, 1, 1000)) == pytest.approx(1.0, abs=0.01)


def test_an_interval_holds_the_middle() -> None:
    low, high = interval(np.linspace(0, 100, 1001))
    assert high - low == pytest.approx(100 * LEVEL)
