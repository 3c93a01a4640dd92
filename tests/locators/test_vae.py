"""The task locator tells clusters apart, knows what it has never seen, and never revises what it learned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from llava_cmoe.locators.base import nearest_task
from llava_cmoe.locators.vae import ProbabilisticTaskLocator
from llava_cmoe.settings.locators import LocatorSettings

WIDTH, RANK, NUM_TASKS = 32, 6, 3
SETTINGS = LocatorSettings(hidden=48, latent=8, epochs=60)


def prompts(task, count, seed):
    """Features of one task: a bent 6-dimensional sheet of its own in a 32-dimensional space, with a little noise."""
    own = torch.Generator().manual_seed(1000 + task)
    sheet_RD, offset_D = torch.randn(RANK, WIDTH, generator=own), 0.5 * torch.randn(WIDTH, generator=own)
    draw = torch.Generator().manual_seed(seed)
    position_BR = torch.randn(count, RANK, generator=draw)
    return torch.tanh(position_BR @ sheet_RD / 2) + offset_D + 0.05 * torch.randn(count, WIDTH, generator=draw)


@pytest.fixture(scope="module")
def fitted():
    """Tensors of three tasks, fitted once."""
    locator = ProbabilisticTaskLocator(SETTINGS)
    return [locator.fit(prompts(task, 400, seed=task), seed=7) for task in range(NUM_TASKS)]


def locator_of(fitted):
    locator = ProbabilisticTaskLocator(SETTINGS)
    for tensors in fitted:
        locator.add(tensors)
    return locator


def test_unseen_prompts_of_every_task_are_located(fitted):
    locator = locator_of(fitted)
    for task in range(NUM_TASKS):
        located = locator.locate(prompts(task, 200, seed=50 + task))
        assert (located.task_B == task).float().mean() > 0.95
        assert located.score_BN.shape == (200, NUM_TASKS)


def test_one_batch_may_mix_tasks_and_scores_do_not_depend_on_batch_mates(fitted):
    locator = locator_of(fitted)
    mixed_BD = torch.cat([prompts(task, 4, seed=80) for task in range(NUM_TASKS)])
    together = locator.locate(mixed_BD)
    alone_BN = torch.cat([locator.locate(feature_D[None]).score_BN for feature_D in mixed_BD])
    torch.testing.assert_close(together.score_BN, alone_BN, rtol=1e-4, atol=1e-4)
    assert together.task_B.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_later_task_leaves_older_scores_bit_identical(fitted):
    feature_BD = torch.cat([prompts(task, 5, seed=60) for task in range(NUM_TASKS)])
    locator = ProbabilisticTaskLocator(SETTINGS)
    before_BN = torch.empty(len(feature_BD), 0)
    for tensors in fitted:
        locator.add(tensors)
        after_BN = locator.locate(feature_BD).score_BN
        assert torch.equal(after_BN[:, : before_BN.shape[1]], before_BN)
        before_BN = after_BN


def test_inputs_unlike_every_task_belong_to_none(fitted):
    far_BD = 5 * torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(3))
    located = locator_of(fitted).locate(far_BD)
    assert (located.task_B == -1).float().mean() > 0.95
    assert torch.isfinite(located.score_BN).all()


def test_calibrated_threshold_keeps_the_tasks_own_prompts_and_is_never_below_three(fitted):
    for task, tensors in enumerate(fitted):
        assert tensors["threshold"] >= 3
        score_B = locator_of([tensors]).locate(prompts(task, 500, seed=90)).score_BN[:, 0]
        assert (score_B <= tensors["threshold"]).float().mean() > 0.95


def test_given_threshold_replaces_the_calibrated_one():
    strict = ProbabilisticTaskLocator(SETTINGS.model_copy(update={"unseen_threshold": -100.0}))
    strict.add(strict.fit(prompts(0, 100, seed=0), seed=0))
    assert strict.locate(prompts(0, 10, seed=1)).task_B.tolist() == [-1] * 10


def test_scores_are_z_values_of_held_out_prompts(fitted):
    score_B = locator_of(fitted).locate(prompts(1, 2000, seed=91)).score_BN[:, 1]
    assert abs(float(score_B.mean())) < 0.5 and 0.5 < float(score_B.std()) < 2


def test_scale_and_offset_of_a_feature_do_not_matter(fitted):
    locator, feature_BD = locator_of(fitted), prompts(0, 8, seed=92)
    moved = locator.locate(3 * feature_BD + 2)
    torch.testing.assert_close(moved.score_BN, locator.locate(feature_BD).score_BN, rtol=1e-3, atol=1e-3)


def test_same_seed_gives_the_same_bytes_and_the_global_generator_plays_no_part(fitted):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = ProbabilisticTaskLocator(SETTINGS).fit(prompts(1, 400, seed=1), seed=7)
    assert save(again) == save(fitted[1])
    assert torch.equal(torch.get_rng_state(), state)
    other = ProbabilisticTaskLocator(SETTINGS).fit(prompts(1, 400, seed=1), seed=8)
    assert save(other) != save(fitted[1])


def test_fitting_works_where_gradients_are_off(fitted):
    with torch.no_grad():
        again = ProbabilisticTaskLocator(SETTINGS).fit(prompts(1, 400, seed=1), seed=7)
    assert save(again) == save(fitted[1])


def test_fit_leaves_the_locator_as_it_was(fitted):
    locator = locator_of(fitted[:1])
    locator.fit(prompts(1, 50, seed=1), seed=0)
    assert locator.num_tasks == 1


def test_save_and_restore_keep_every_bit(fitted):
    locator = locator_of(fitted)
    restored = locator_of([load(save(locator.tensors_of(task))) for task in range(NUM_TASKS)])
    for task, tensors in enumerate(fitted):
        kept = restored.tensors_of(task)
        assert kept.keys() == tensors.keys() and all(torch.equal(kept[name], tensors[name]) for name in tensors)
    feature_BD = prompts(2, 9, seed=70)
    assert torch.equal(restored.locate(feature_BD).score_BN, locator.locate(feature_BD).score_BN)


def test_early_stopping_returns_the_best_epoch_so_more_epochs_never_hurt_the_held_out_error():
    errors = [
        float(
            ProbabilisticTaskLocator(SETTINGS.model_copy(update={"epochs": epochs, "patience": 100})).fit(
                prompts(0, 60, seed=0), seed=0
            )["error_mean"]
        )
        for epochs in (1, 5, 40, 80)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[2]


@pytest.mark.parametrize("patience", [1, 1000])
def test_patience_ends_the_fit(patience):
    """A high learning rate makes the held-out error jump: patience 1 stops there, a longer one sees it fall later."""
    jumpy = SETTINGS.model_copy(update={"learning_rate": 0.03, "patience": patience})
    few, many = (
        ProbabilisticTaskLocator(jumpy.model_copy(update={"epochs": epochs})).fit(prompts(0, 80, seed=0), seed=0)
        for epochs in (25, 100)
    )
    assert (save(few) == save(many)) == (patience == 1)


def test_a_fit_that_diverges_is_an_error_not_a_locator():
    with pytest.raises(ValueError, match="lower locator.learning_rate"):
        ProbabilisticTaskLocator(SETTINGS.model_copy(update={"learning_rate": 5.0})).fit(prompts(0, 80, seed=0), seed=0)


def test_identical_prompts_give_finite_scores():
    locator = ProbabilisticTaskLocator(SETTINGS)
    locator.add(locator.fit(prompts(0, 1, seed=0).expand(40, WIDTH), seed=0))
    assert torch.isfinite(locator.locate(prompts(0, 5, seed=1)).score_BN).all()


def test_a_locator_without_tasks_knows_nobody():
    located = ProbabilisticTaskLocator(SETTINGS).locate(prompts(0, 3, seed=0))
    assert located.task_B.tolist() == [-1] * 3 and located.score_BN.shape == (3, 0)


def test_unusable_features_and_foreign_tensors_are_refused(fitted):
    locator = locator_of(fitted)
    with pytest.raises(ValueError, match="at least 3 features .* got 2"):
        locator.fit(prompts(0, 2, seed=0), seed=0)
    with pytest.raises(ValueError, match="inf or nan"):
        locator.fit(torch.full((20, WIDTH), torch.nan), seed=0)
    with pytest.raises(ValueError, match="threshold"):
        locator.add({name: tensor for name, tensor in fitted[0].items() if name != "threshold"})
    wider = ProbabilisticTaskLocator(SETTINGS).fit(torch.randn(20, WIDTH + 1), seed=0)
    with pytest.raises(ValueError, match=f"locator of task 3: .*{WIDTH + 1}"):
        locator.add(wider)
    with pytest.raises(IndexError, match="task 3 is not known"):
        locator.tensors_of(3)
    assert locator.num_tasks == NUM_TASKS


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(
        st.lists(st.floats(-9, 9, width=32) | st.just(float("nan")), min_size=3, max_size=3), min_size=1, max_size=5
    ),
    thresholds=st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3),
)
def test_the_lowest_score_wins_unless_above_its_own_threshold(scores, thresholds):
    located = nearest_task(torch.tensor(scores), torch.tensor(thresholds))
    for row, task in zip(scores, located.task_B.tolist(), strict=True):
        if any(score != score for score in row):
            assert task == -1
        else:
            best = row.index(min(row))
            assert task == (best if row[best] <= thresholds[best] else -1)
