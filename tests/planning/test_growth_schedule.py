"""Sizes on paper are the sizes of what is learned, and those of the formulas."""

import pytest

from llava_cmoe.experts.ledger import Size
from llava_cmoe.planning.growth_schedule import fits_on_paper, growth_schedule, on_paper
from llava_cmoe.settings.locators import LocatorSettings
from llava_cmoe.settings.methods.cmoe import CmoeSettings, ExpertSettings, ProbeSettings
from llava_cmoe.settings.recipes import load_recipe, shipped
from llava_cmoe.settings.run import Recipe

LAYERS, WIDTH, INNER = 32, 4096, 11008
PAPER_MEAN = 43_960_000
"""Mean of the parameters that LLaVA-CMoE trains per task of CoIN (arXiv 2503.21227)."""


def of_pocket(method: CmoeSettings) -> Recipe:
    return Recipe.model_validate({"run": "runs/x", "backbone": {"path": "pocket"}, "method": method})


def of_7b(method: CmoeSettings) -> Recipe:
    return Recipe.model_validate(
        {"run": "runs/x", "backbone": {"path": "llava-hf/llava-1.5-7b-hf", "dtype": "bfloat16"}, "method": method}
    )


@pytest.mark.parametrize("num_grown", [0, 8, LAYERS])
def test_7b_is_as_large_as_the_formulas_say(num_grown: int):
    settings = CmoeSettings(experts=ExpertSettings(rank=16, num_first=2), probe=ProbeSettings(max_new_experts=3))
    schedule = growth_schedule(of_7b(settings), 3, num_grown)
    expert = 45_312 * 16
    experts = [2 * LAYERS * expert, *[3 * num_grown * expert] * 2]
    routers = [WIDTH * (2 * LAYERS + 3 * num_grown * task) for task in range(3)]
    trained = [size.trained.parameters for size in schedule.tasks]
    assert trained == [task + router for task, router in zip(experts, routers, strict=True)]
    assert (schedule.mean, schedule.num_grown) == (sum(trained) / 3, num_grown)
    vae = WIDTH * 512 + 512 + 512 * 128 + 128 + 64 * 512 + 512 + 512 * WIDTH + WIDTH
    assert {size.also_stored.parameters for size in schedule.tasks} == {vae + 3}  # and mean, std, threshold
    assert schedule.tasks[0].stored.bytes == 4 * (trained[0] + vae + 3)


def test_a_recipe_of_lora_on_every_linear_of_7b_trains_what_its_formula_says():
    recipe = of_7b(CmoeSettings()).model_dump() | {"method": {"name": "sequential_lora", "rank": 128}}
    [size] = growth_schedule(Recipe.model_validate(recipe), 1).tasks
    assert size.trained.parameters == 128 * LAYERS * (4 * 2 * WIDTH + 3 * (WIDTH + INNER)) == 319_815_680


@pytest.mark.parametrize("kind", ["vae", "autoencoder", "gaussian", "prototype"])
def test_a_locator_is_as_large_as_its_formula_says(kind: str):
    width = 224
    settings = CmoeSettings(locator=LocatorSettings(kind=kind, hidden=16, latent=4))
    outputs = {"vae": 8, "autoencoder": 4}.get(kind, 0)
    network = width * 16 + 16 + 16 * outputs + outputs + 4 * 16 + 16 + 16 * width + width
    parameters = {"gaussian": width + width * width, "prototype": width}.get(kind, network) + 3
    [size] = growth_schedule(of_pocket(settings), 1).tasks
    assert size.also_stored == Size(parameters, 4 * parameters)


def test_the_sites_that_grow_are_as_many_as_given_and_spread_over_the_depth():
    method = on_paper(of_pocket(CmoeSettings()))
    *_, last = fits_on_paper(method, num_stages=2, num_grown=3)
    assert (last.stage, last.num_sites) == (1, 3) and method.host is not None
    assert [bank.num_experts for bank in method.host.banks.values()] == [3, 2, 3, 2, 3, 2]


@pytest.mark.parametrize("num_grown", [None, 0, 3])
def test_probes_are_at_every_site_and_leave_nothing(num_grown: int | None):
    method = on_paper(of_pocket(CmoeSettings()))
    assert method.host is not None
    probed = {
        fit.stage: [bank.num_experts for bank in method.host.banks.values()]
        for fit in fits_on_paper(method, num_stages=3, num_grown=num_grown)
        if fit.label == "probing"
    }
    num_grown = 4 if num_grown is None else num_grown
    assert list(probed) == [1, 2] and probed[1] == [3] * 6 and sum(probed[2]) == 6 * 3 + num_grown


@pytest.mark.parametrize(
    ("probe", "expected"),
    [({"alpha": 0.25}, 19), ({"alpha": 0}, 16), ({"alpha": 1}, 27), ({"scope": "all"}, 32), ({"scope": "none"}, 0)],
)
def test_eq_2_makes_this_many_of_32_layers_likely(probe: dict[str, object], expected: int):
    settings = CmoeSettings(probe=ProbeSettings.model_validate(probe))
    assert growth_schedule(of_7b(settings), 2).num_grown == expected


def test_the_recipe_of_coin_trains_about_the_papers_mean():
    recipe = load_recipe(shipped("train/recipes/coin_cmoe_llava_7b.yaml"))
    assert growth_schedule(recipe, 8).mean == pytest.approx(PAPER_MEAN, rel=0.02)
