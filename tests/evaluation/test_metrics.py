"""Metrics against published tables, a matrix worked by hand, and identities that hold for any matrix."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_cmoe.evaluation import metrics
from llava_cmoe.evaluation.metrics import DEFINITIONS, all_metrics, missing_cells

# A busy machine is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# CoIN, LLaVA-7B, triangles without ScienceQA; one list per task: after its own stage, then after each later one.
# Source: result files in the history of the CoIN repository.
COIN_LORA = [
    [49.99, 0.04, 18.62, 25.13, 0.00, 36.83, 28.74],
    [96.05, 6.42, 4.70, 0.00, 8.43, 10.25],
    [56.40, 40.08, 7.25, 50.18, 36.78],
    [55.45, 0.05, 22.77, 32.45],
    [31.27, 2.49, 0.83],
    [62.20, 42.50],
    [57.08],
]
COIN_MOELORA = [
    [51.73, 13.15, 35.53, 41.69, 13.97, 50.48, 38.63],
    [96.70, 6.62, 5.53, 0.25, 8.15, 10.50],
    [59.42, 45.27, 32.62, 51.75, 37.38],
    [58.88, 30.40, 28.52, 43.62],
    [37.50, 0.97, 0.59],
    [64.22, 43.15],
    [60.08],
]
# UCIT, six tasks, rows = after task (published table).
UCIT = [
    [90.97],
    [90.38, 92.60],
    [73.90, 86.33, 59.54],
    [75.67, 68.77, 47.34, 53.30],
    [75.10, 74.53, 46.73, 52.30, 69.73],
    [65.77, 71.27, 45.05, 51.20, 49.60, 57.47],
]


def by_row(columns: list[list[float]]) -> list[list[float]]:
    return [[columns[i][j - i] for i in range(j + 1)] for j in range(len(columns))]


@pytest.mark.parametrize(
    ("matrix", "published"),
    [
        (
            by_row(COIN_LORA),
            {"immediate": 58.3486, "last": 29.8043, "maa": 32.0748, "bwt": -28.5443, "bwt_gem": -33.3017},
        ),
        (
            by_row(COIN_MOELORA),
            {"immediate": 61.2186, "last": 33.4214, "maa": 38.3912, "bwt": -27.7971, "bwt_gem": -32.43},
        ),
    ],
    ids=["lora", "moelora"],
)
def test_coin_triangles_give_the_published_metrics(matrix: list[list[float]], published: dict[str, float]) -> None:
    computed = all_metrics(matrix)
    assert {name: computed[name] for name in published} == pytest.approx(published, abs=5e-5)


def test_ucit_table_gives_the_published_metrics() -> None:
    computed = all_metrics(UCIT)
    published = {"immediate": 70.60, "last": 56.73, "maa": 72.90, "bwt": -13.88, "bwt_gem": -16.65}
    assert {name: computed[name] for name in published} == pytest.approx(published, abs=6e-3)


@pytest.mark.parametrize(
    ("immediate", "last", "published"),
    [  # CoIN's eight-task rows; ScienceQA from the paper's table
        (
            [82.45, 49.99, 96.05, 56.40, 55.45, 31.27, 62.20, 57.08],
            [21.26, 28.74, 10.25, 36.78, 32.45, 0.83, 42.50, 57.08],
            {"immediate": 61.36, "last": 28.74, "bwt": -32.62},
        ),
        (
            [75.78, 51.73, 96.70, 59.42, 58.88, 37.50, 64.22, 60.08],
            [63.09, 38.63, 10.50, 37.38, 43.62, 0.59, 43.15, 60.08],
            {"immediate": 63.04, "last": 37.13, "bwt": -25.91},
        ),
    ],
    ids=["lora", "moelora"],
)
def test_eight_task_rows_of_coin_need_only_the_diagonal_and_the_last_row(
    immediate: list[float], last: list[float], published: dict[str, float]
) -> None:
    matrix: list[list[float | None]] = [[None] * i + [immediate[i]] for i in range(8)]
    matrix[7] = list(last)
    computed = all_metrics(matrix)
    assert {name: computed[name] for name in published} == pytest.approx(published, abs=6e-3)
    assert computed["maa"] is None and computed["forgetting"] is None


def test_a_matrix_worked_by_hand() -> None:
    matrix = [[80.0, 10.0, 20.0], [90.0, 60.0, 30.0], [50.0, 40.0, 70.0]]
    assert all_metrics(matrix) == pytest.approx(
        {
            "immediate": 70.0,  # (80 + 60 + 70) / 3
            "last": 160 / 3,  # (50 + 40 + 70) / 3
            "maa": (80 + 75 + 160 / 3) / 3,
            "bwt": -50 / 3,  # (-30 - 20 + 0) / 3
            "bwt_gem": -25.0,  # the same sum / 2
            "forgetting": 30.0,  # ((90 - 50) + (60 - 40)) / 2
            "transfer": 20.0,  # (10 + 20 + 30) / 3
        }
    )


def test_what_forgets_all_and_what_gains_by_later_tasks_worked_by_hand() -> None:
    forgets = [[90.0], [0.0, 60.0], [0.0, 0.0, 30.0]]
    assert all_metrics(forgets) == pytest.approx(
        {
            "immediate": 60.0, "last": 10.0, "maa": (90 + 30 + 10) / 3, "bwt": -50.0, "bwt_gem": -75.0,
            "forgetting": 75.0, "transfer": None,
        }
    )  # fmt: skip
    gains = [[10.0], [20.0, 30.0], [40.0, 50.0, 60.0]]
    computed = all_metrics(gains)
    assert computed["bwt"] == pytest.approx((30 + 20 + 0) / 3) and computed["bwt_gem"] == 25.0
    assert computed["forgetting"] == 0.0


@pytest.mark.parametrize(
    ("absent", "lacking"),
    [
        ((1, 0), {"maa", "forgetting"}),
        ((1, 1), {"immediate", "maa", "bwt", "bwt_gem", "forgetting"}),
        ((2, 0), {"last", "maa", "bwt", "bwt_gem", "forgetting"}),
        ((2, 2), {"immediate", "last", "maa", "bwt"}),
    ],
)
def test_a_cell_that_was_not_measured_is_named_by_each_metric_that_lacks_it(
    absent: tuple[int, int], lacking: set[str]
) -> None:
    matrix = [[None if (j, i) == absent else 50.0 for i in range(j + 1)] for j in range(3)]
    assert missing_cells(matrix) == {name: (absent,) for name in DEFINITIONS if name in lacking}
    assert {name for name, value in all_metrics(matrix).items() if value is None} == lacking | {"transfer"}


def test_a_whole_triangle_misses_nothing() -> None:
    assert missing_cells(UCIT) == missing_cells([]) == {}


def test_a_single_task_has_nothing_to_forget() -> None:
    assert all_metrics([[75.0]]) == {
        "immediate": 75.0, "last": 75.0, "maa": 75.0, "bwt": 0.0, "bwt_gem": None, "forgetting": None, "transfer": None,
    }  # fmt: skip


def test_only_the_last_row_gives_last_and_nothing_that_needs_history() -> None:
    """The joint method is measured once, at the end."""
    computed = all_metrics([[], [], [50.0, 60.0, 70.0]])
    assert computed["last"] == 60.0
    assert {name for name, value in computed.items() if value is None} == set(DEFINITIONS) - {"last"}


def test_an_empty_matrix_has_no_metrics() -> None:
    assert set(all_metrics([]).values()) == {None}


def test_every_metric_is_defined_under_its_name() -> None:
    assert list(all_metrics([[1.0]])) == list(DEFINITIONS)


@st.composite
def triangles(draw: st.DrawFn) -> list[list[float]]:
    num_tasks = draw(st.integers(2, 6))
    return [[draw(st.floats(0, 100)) for _ in range(j + 1)] for j in range(num_tasks)]


@UNHURRIED
@given(triangles())
def test_bwt_is_last_minus_immediate_and_forgetting_bounds_it(matrix: list[list[float]]) -> None:
    computed = all_metrics(matrix)
    num_tasks = len(matrix)
    assert computed["bwt"] == pytest.approx(computed["last"] - computed["immediate"], abs=1e-9)
    assert computed["bwt_gem"] == pytest.approx(computed["bwt"] * num_tasks / (num_tasks - 1), abs=1e-9)
    assert computed["forgetting"] >= max(0.0, -computed["bwt_gem"]) - 1e-9


@UNHURRIED
@given(triangles())
def test_a_method_that_never_changes_an_answer_forgets_nothing(matrix: list[list[float]]) -> None:
    diagonal = [matrix[i][i] for i in range(len(matrix))]
    constant = [diagonal[: j + 1] for j in range(len(matrix))]
    assert metrics.bwt(constant) == metrics.forgetting(constant) == 0.0
