"""Every kind of locator tells clusters apart and never revises what it learned; scores and selection are as set."""

import math
from itertools import product

import pytest
import torch
from safetensors.torch import load, save

from llava_cmoe.locators import LOCATORS
from llava_cmoe.locators.base import Locator, nearest_task, nearest_tasks
from llava_cmoe.locators.gaussian import VARIANCE_FLOOR, shrunk_covariance
from llava_cmoe.locators.prototype import PrototypeLocator
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.locators import LocatorSettings
from llava_cmoe.settings.recipes import parse_settings

WIDTH, NUM_TASKS = 24, 3
KINDS = (*((kind, "reconstruction") for kind in LOCATORS), ("vae", "elbo"))


def normalised(feature_BD):
    return torch.nn.functional.layer_norm(feature_BD, feature_BD.shape[-1:])


def prompts(task, count, seed):
    """Features of one task: a cluster around its own centre, wide in three directions of its own."""
    own = torch.Generator().manual_seed(1000 + task)
    centre_D, wide_3D = torch.randn(WIDTH, generator=own), torch.randn(3, WIDTH, generator=own)
    draw = torch.Generator().manual_seed(seed)
    return centre_D + (
        0.3 * torch.randn(count, 3, generator=draw) @ wide_3D + 0.1 * torch.randn(count, WIDTH, generator=draw)
    )


def settings_of(kind, error="reconstruction", **others):
    return LocatorSettings(
        kind=kind, error=error, **{"hidden": 32, "latent": 6, "epochs": 40, "learning_rate": 3e-3, **others}
    )


def locator_of(settings, fitted):
    locator = LOCATORS[settings.kind](settings)
    for tensors in fitted:
        locator.add(tensors)
    return locator


def fit_all(settings):
    locator = LOCATORS[settings.kind](settings)
    return [locator.fit(prompts(task, 200, seed=task), seed=7) for task in range(NUM_TASKS)]


@pytest.fixture(scope="module")
def fits():
    """Tensors of three tasks by kind and error, fitted once."""
    return {kind: fit_all(settings_of(*kind)) for kind in KINDS}


@pytest.fixture(params=KINDS, ids=":".join)
def kind(request):
    return request.param


def test_the_table_and_the_settings_know_the_same_kinds():
    for name in LOCATORS:
        assert LocatorSettings(kind=name).kind == name
    with pytest.raises(RecipeError, match="kind: .*'vae', 'autoencoder', 'ppca', 'gaussian' or 'prototype'"):
        parse_settings(LocatorSettings, {"kind": "oracle"}, source="recipe")


def test_an_elbo_without_a_vae_is_refused():
    for name in LOCATORS.keys() - {"vae"}:
        with pytest.raises(RecipeError, match=f"elbo is the VAE's, kind is {name}"):
            parse_settings(LocatorSettings, {"kind": name, "error": "elbo"}, source="recipe")


def test_clusters_are_told_apart_and_far_outliers_belong_to_none(fits, kind):
    locator = locator_of(settings_of(*kind), fits[kind])
    for task in range(NUM_TASKS):
        own = locator.locate(prompts(task, 100, seed=50 + task))
        assert (own.score_BN.argmin(dim=1) == task).float().mean() > 0.95
        assert (own.task_B == task).float().mean() > 0.9  # of 20 held out, the threshold is about the largest error
    far_BD = 5 * torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(3))
    located = locator.locate(far_BD)
    assert (located.task_B == -1).float().mean() > 0.95 and torch.isfinite(located.score_BN).all()


def test_same_seed_gives_the_same_bytes_and_the_global_generator_plays_no_part(fits, kind):
    torch.manual_seed(123)
    again = LOCATORS[kind[0]](settings_of(*kind)).fit(prompts(1, 200, seed=1), seed=7)
    assert save(again) == save(fits[kind][1])


def test_a_later_task_leaves_older_scores_bit_identical(fits, kind):
    feature_BD = torch.cat([prompts(task, 5, seed=60) for task in range(NUM_TASKS)])
    before_BN = torch.empty(len(feature_BD), 0)
    for num in range(1, NUM_TASKS + 1):
        after_BN = locator_of(settings_of(*kind), fits[kind][:num]).locate(feature_BD).score_BN
        assert torch.equal(after_BN[:, : num - 1], before_BN)
        before_BN = after_BN


def test_save_and_restore_keep_every_bit(fits, kind):
    locator = locator_of(settings_of(*kind), fits[kind])
    restored = locator_of(settings_of(*kind), [load(save(locator.tensors_of(task))) for task in range(NUM_TASKS)])
    feature_BD = prompts(2, 9, seed=70)
    assert torch.equal(restored.locate(feature_BD).score_BN, locator.locate(feature_BD).score_BN)


def test_scores_do_not_depend_on_batch_mates(fits, kind):
    locator = locator_of(settings_of(*kind), fits[kind])
    mixed_BD = torch.cat([prompts(task, 4, seed=80) for task in range(NUM_TASKS)])
    alone_BN = torch.cat([locator.locate(feature_D[None]).score_BN for feature_D in mixed_BD])
    torch.testing.assert_close(locator.locate(mixed_BD).score_BN, alone_BN, rtol=1e-4, atol=1e-4)


def test_identical_prompts_give_finite_scores(kind):
    locator = LOCATORS[kind[0]](settings_of(*kind))
    locator.add(locator.fit(prompts(0, 1, seed=0).expand(40, WIDTH), seed=0))
    assert torch.isfinite(locator.locate(prompts(0, 5, seed=1)).score_BN).all()


def test_tensors_of_another_kind_are_refused(fits):
    for (name, error), (other, _) in product(KINDS, KINDS):
        if name != other:
            with pytest.raises(ValueError, match=f"not the tensors of a {name} locator"):
                LOCATORS[name](settings_of(name, error)).add(fits[other, "reconstruction"][0])


# Score: what tasks are compared by.


class UnequalPrototypes(PrototypeLocator):
    """Prototypes whose errors are given in a unit of the task's own."""

    names = ("mean", "unit")
    unit = 1.0

    def model(self, train_SD, held_SD, generator):
        return super().model(train_SD, held_SD, generator) | {"unit": torch.tensor([self.unit])}

    def error(self, models, x_BD):
        return models["unit"].unsqueeze(1) * super().error(models, x_BD)


@pytest.mark.parametrize("score", ["z", "raw"])
def test_a_z_score_does_not_depend_on_a_tasks_unit_of_error_and_a_raw_score_does(score):
    feature_BD = torch.cat([prompts(task, 20, seed=60) for task in range(2)])

    def located(units):
        locator = UnequalPrototypes(settings_of("prototype", score=score))
        for task, unit in enumerate(units):
            locator.unit = unit
            locator.add(locator.fit(prompts(task, 200, seed=task), seed=7))
        return locator.locate(feature_BD)

    equal, unequal = located((1.0, 1.0)), located((1.0, 1000.0))
    assert torch.allclose(equal.score_BN, unequal.score_BN, rtol=1e-3, atol=1e-3) == (score == "z")
    assert torch.equal(equal.task_B, unequal.task_B) == (score == "z")


def test_a_task_alone_rejects_the_same_prompts_by_raw_error_as_by_z_score(kind):
    """Within one task a z-score only moves and scales errors, and the calibrated threshold moves along."""
    near_and_far_BD = prompts(0, 300, seed=5) + torch.linspace(0, 1, 300)[:, None] * prompts(1, 300, seed=6)
    verdicts = []
    for score in ("z", "raw"):
        locator = LOCATORS[kind[0]](settings_of(*kind, score=score))
        locator.add(locator.fit(prompts(0, 200, seed=0), seed=7))
        verdicts.append(locator.locate(near_and_far_BD).task_B)
    assert torch.equal(*verdicts) and 10 < int((verdicts[0] == -1).sum()) < 290


@pytest.mark.parametrize("score", ["z", "raw"])
def test_a_threshold_that_is_set_counts_in_std_of_the_tasks_own_errors_by_either_score(fits, score):
    settings = settings_of("prototype", score=score, unseen_threshold=2.5)
    model = LOCATORS["prototype"](settings).fit(prompts(0, 200, seed=0), seed=7)
    expected = model["error_mean"] + 2.5 * model["error_std"] if score == "raw" else torch.tensor(2.5)
    torch.testing.assert_close(model["threshold"], expected)


def test_a_raw_score_is_the_error_itself(fits):
    locator = locator_of(settings_of("prototype", score="raw"), fits["prototype", "reconstruction"])
    feature_BD = prompts(0, 5, seed=61)
    for task, score_B in enumerate(locator.locate(feature_BD).score_BN.T):
        distance_B = (normalised(feature_BD) - locator.tensors_of(task)["mean"]).square().mean(dim=1)
        torch.testing.assert_close(score_B, distance_B)


def test_the_negative_elbo_adds_beta_kl_to_the_reconstruction_error(fits):
    tensors, feature_BD = fits["vae", "reconstruction"][0], prompts(0, 6, seed=62)

    def error_B(error, beta):
        return (
            locator_of(settings_of("vae", error, beta=beta, score="raw"), [tensors]).locate(feature_BD).score_BN[:, 0]
        )

    plain_B, elbo_B = error_B("reconstruction", 0.5), error_B("elbo", 0.5)
    x_BD = normalised(feature_BD)
    hidden_BH = torch.nn.functional.gelu(x_BD @ tensors["encode.weight"] + tensors["encode.bias"])
    mean_BZ, log_variance_BZ = (hidden_BH @ tensors["posterior.weight"] + tensors["posterior.bias"]).chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean_BZ, (0.5 * log_variance_BZ).exp())
    kl_B = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(elbo_B - plain_B, 0.5 * kl_B, rtol=1e-4, atol=1e-5)
    assert torch.equal(error_B("elbo", 0.0), plain_B)


# Gaussian.


def test_the_gaussians_error_is_the_negative_log_likelihood_of_a_shrunk_covariance():
    settings = settings_of("gaussian", score="raw", shrinkage=0.2)
    feature_SD, asked_BD = prompts(0, 50, seed=0), prompts(0, 7, seed=1)
    locator = LOCATORS["gaussian"](settings)
    order_S = torch.randperm(50, generator=torch.Generator().manual_seed(7))
    x_SD = normalised(feature_SD)[order_S[5:]].double()  # a tenth is held out
    locator.add(locator.fit(feature_SD, seed=7))
    sample_DD = torch.cov(x_SD.T, correction=0)
    scale = sample_DD.trace() / WIDTH
    covariance_DD = 0.8 * sample_DD + (0.2 * scale + VARIANCE_FLOOR) * torch.eye(WIDTH)
    normal = torch.distributions.MultivariateNormal(x_SD.mean(0), covariance_DD)
    expected_B = -normal.log_prob(normalised(asked_BD).double()) / WIDTH
    torch.testing.assert_close(locator.locate(asked_BD).score_BN[:, 0].double(), expected_B, rtol=1e-4, atol=1e-4)


def test_computed_shrinkage_is_ledoit_and_wolfs():
    x_SD = prompts(0, 30, seed=0).double()
    x_SD = x_SD - x_SD.mean(0)
    sample_DD = x_SD.T @ x_SD / 30
    target_DD = sample_DD.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    b2 = sum((torch.outer(x_D, x_D) - sample_DD).square().sum() for x_D in x_SD) / 30**2
    weight = float(b2 / (sample_DD - target_DD).square().sum())
    assert 0 < weight < 1
    torch.testing.assert_close(shrunk_covariance(x_SD, None), shrunk_covariance(x_SD, weight))


def test_fewer_features_shrink_more():
    def weight(num):
        """Of the identity: the smallest eigenvalue is weight * scale where the sample covariance has rank < D."""
        x_SD = normalised(prompts(0, num, seed=0)).double()
        x_SD = x_SD - x_SD.mean(0)
        return float(torch.linalg.eigvalsh(shrunk_covariance(x_SD, None))[0] * WIDTH / x_SD.square().mean(0).sum())

    assert 1 > weight(6) > weight(60) > weight(600) > 0


def test_a_fully_shrunk_gaussian_scores_as_the_prototype_does(fits):
    round_settings = settings_of("gaussian", shrinkage=1.0)
    feature_BD = torch.cat([prompts(task, 5, seed=63) for task in range(NUM_TASKS)])
    score_BN = locator_of(round_settings, fit_all(round_settings)).locate(feature_BD).score_BN
    expected_BN = locator_of(settings_of("prototype"), fits["prototype", "reconstruction"]).locate(feature_BD).score_BN
    torch.testing.assert_close(score_BN, expected_BN, rtol=1e-3, atol=1e-3)


# Probabilistic PCA.


def ppca_of(latent, feature_SD):
    locator = LOCATORS["ppca"](settings_of("ppca", latent=latent, score="raw"))
    locator.add(locator.fit(feature_SD, seed=7))
    return locator


@pytest.mark.parametrize("num", [8, 20, 200])  # fewer features than directions, than entries, and many
@pytest.mark.parametrize("latent", [1, 6, WIDTH])
def test_the_ppcas_error_is_the_negative_log_likelihood_of_its_own_directions_and_one_variance(num, latent):
    locator, asked_BD = ppca_of(latent, prompts(0, num, seed=0)), prompts(0, 7, seed=1)
    model = {name: tensor.double() for name, tensor in locator.tensors_of(0).items()}
    directions_DK, residual = model["directions"], model["residual"]
    assert directions_DK.shape == (WIDTH, latent)
    wider_K = model["variances"] - residual
    covariance_DD = directions_DK * wider_K @ directions_DK.T + residual * torch.eye(WIDTH)
    normal = torch.distributions.MultivariateNormal(model["mean"], covariance_DD)
    expected_B = -normal.log_prob(normalised(asked_BD).double()) / WIDTH
    torch.testing.assert_close(locator.locate(asked_BD).score_BN[:, 0].double(), expected_B, rtol=1e-3, atol=1e-3)


def test_no_ppca_of_as_many_directions_makes_the_features_likelier():
    """Its closed form is the maximum: turned a little, or with any variance changed, it fits less."""
    feature_SD = prompts(0, 200, seed=0)
    locator = LOCATORS["ppca"](settings_of("ppca", latent=3))
    x_SD = normalised(feature_SD)
    best = locator.model(x_SD, x_SD[:0], torch.Generator())
    turn_DD = torch.matrix_exp(0.05 * (lambda draw: draw - draw.T)(torch.randn(WIDTH, WIDTH)))
    others = {"directions": turn_DD @ best["directions"], "residual": 1.2 * best["residual"]}
    others |= {"variances": best["variances"] * 0.8, "mean": best["mean"] + 0.05}
    least = locator.error(best, x_SD).mean()
    for name, tensor in others.items():
        assert locator.error(best | {name: tensor}, x_SD).mean() > least, name


# Selection.


def located(scores, threshold=2.0):
    score_BN = torch.tensor(scores)
    return nearest_task(score_BN, torch.full(score_BN.shape[1:], threshold))


def test_soft_selection_mixes_the_closest_few_by_softmax():
    soft = nearest_tasks(located([[1.0, -1.0, 0.0], [0.5, 5.0, 1.5]]), num=2, temperature=0.5)
    assert soft.tasks_BK.tolist() == [[1, 2], [0, 2]]
    closest = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(soft.weights_BK, torch.tensor([[closest, 1 - closest]] * 2))
    assert soft.task_B.tolist() == [1, 0]


def test_soft_selection_at_temperature_zero_is_hard_selection():
    hard = located(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).tolist(), threshold=-0.5)
    soft = nearest_tasks(hard, num=3, temperature=1e-6)
    assert torch.equal(soft.tasks_BK[:, 0], hard.task_B)
    assert torch.equal(soft.weights_BK[:, 0], (hard.task_B >= 0).float())
    assert not soft.weights_BK[:, 1:].any() and (hard.task_B == -1).any()


def test_what_no_task_fits_goes_to_the_base_model_under_soft_selection_too():
    soft = nearest_tasks(located([[3.0, 4.0], [float("nan"), 0.0], [0.0, 4.0]]), num=2, temperature=1.0)
    assert soft.tasks_BK.tolist() == [[-1, -1], [-1, -1], [0, 1]]
    assert soft.weights_BK.sum(dim=1).tolist() == [0, 0, 1] and soft.task_B.tolist() == [-1, -1, 0]


def test_a_locator_mixes_only_when_asked_and_no_more_tasks_than_it_knows(fits):
    feature_BD, fitted = prompts(0, 4, seed=64), fits["prototype", "reconstruction"]
    hard = locator_of(settings_of("prototype"), fitted).locate(feature_BD)
    assert hard.tasks_BK.shape == (4, 1) and hard.weights_BK.tolist() == [[float(task >= 0)] for task in hard.task_B]
    soft: Locator = locator_of(settings_of("prototype", selection="soft", num_mixed=9), fitted[:2])
    assert soft.locate(feature_BD).tasks_BK.shape == (4, 2)
    nobody = locator_of(settings_of("prototype", selection="soft"), []).locate(feature_BD)
    assert nobody.tasks_BK.tolist() == [[-1]] * 4 and not nobody.weights_BK.any() and nobody.score_BN.shape == (4, 0)
