"""Sizes on paper are the sizes of what is learned, and those of the formulas."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny import Lesson

from llava_cmoe.experts import ledger
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.planning.growth_schedule import expected_sites, growth_of, locator_size, on_paper, task_sizes
from llava_cmoe.settings.locators import LocatorSettings
from llava_cmoe.settings.methods.cmoe import CmoeSettings, ExpertSettings, ProbeSettings
from llava_cmoe.settings.recipes import load_recipe, shipped
from llava_cmoe.settings.run import Recipe

LAYERS, WIDTH, INNER = 32, 4096, 11008
PAPER_MEAN = 43_960_000
"""Mean of the parameters that LLaVA-CMoE trains per task of CoIN (arXiv 2503.21227)."""


def of_7b(method: CmoeSettings) -> Recipe:
    return Recipe.model_validate(
        {"run": "runs/x", "backbone": {"path": "llava-hf/llava-1.5-7b-hf", "dtype": "bfloat16"}, "method": method}
    )


@pytest.fixture(scope="module")
def cmoe_7b() -> Cmoe:
    method = on_paper(of_7b(CmoeSettings()))
    assert isinstance(method, Cmoe)
    return method


@pytest.mark.parametrize("method", ["cmoe", "sequential_lora", "moelora"])
def test_every_task_of_a_real_run_is_as_large_as_on_paper(method: str, lesson_of: Callable[[str], Lesson]):
    lesson = lesson_of(method)
    sizes = task_sizes(lesson.recipe, list(lesson.results.growth.values()))
    for size, record in zip(sizes, lesson.run.registry.records(), strict=True):
        assert size.trained.parameters == record.facts["trainable_parameters"]
        assert size.locator.parameters == record.facts.get("locator_parameters", 0)
        assert size.routers.parameters == record.facts.get("router_parameters", 0)
        folder = lesson.recipe.run / "tasks" / f"{record.index + 1:02}_{record.name}"
        assert size.stored.bytes == sum(map(tensor_bytes, folder.glob("*.safetensors")))


def tensor_bytes(file: Path) -> int:
    """Of the tensors in a file, without the header that names them."""
    with safe_open(file, framework="pt") as tensors:
        return ledger.size_of(tensors.get_tensor(name) for name in tensors.keys()).bytes  # noqa: SIM118


@pytest.mark.parametrize("num_grown", [0, 8, LAYERS])
def test_7b_is_as_large_as_the_formulas_say(cmoe_7b: Cmoe, num_grown: int):
    settings = CmoeSettings(experts=ExpertSettings(rank=16, num_first=2), probe=ProbeSettings(max_new_experts=3))
    growth = growth_of(settings, list(cmoe_7b.host.banks), 3, num_grown)
    sizes = task_sizes(of_7b(settings), growth)
    expert = 45_312 * 16
    assert [size.experts.parameters for size in sizes] == [2 * LAYERS * expert, *[3 * num_grown * expert] * 2]
    rows = [2 * LAYERS + 3 * num_grown * task for task in range(3)]
    assert [size.routers.parameters for size in sizes] == [WIDTH * row for row in rows]
    vae = WIDTH * 512 + 512 + 512 * 128 + 128 + 64 * 512 + 512 + 512 * WIDTH + WIDTH
    assert {size.locator.parameters for size in sizes} == {vae + 3}  # and mean, std, threshold
    assert sizes[0].stored.bytes == 4 * (2 * LAYERS * expert + WIDTH * 2 * LAYERS + vae + 3)


def test_a_recipe_of_lora_on_every_linear_of_7b_trains_what_its_formula_says():
    recipe = of_7b(CmoeSettings()).model_dump() | {"method": {"name": "sequential_lora", "rank": 128}}
    [size] = task_sizes(Recipe.model_validate(recipe), [{}])
    assert size.trained.parameters == 128 * LAYERS * (4 * 2 * WIDTH + 3 * (WIDTH + INNER)) == 319_815_680


@pytest.mark.parametrize("kind", ["vae", "autoencoder", "gaussian", "prototype"])
def test_a_locator_is_as_large_as_its_formula_says(kind: str):
    settings = LocatorSettings(kind=kind, hidden=16, latent=4)
    outputs = {"vae": 8, "autoencoder": 4}
    network = 24 * 16 + 16 + 16 * outputs.get(kind, 0) + outputs.get(kind, 0) + 4 * 16 + 16 + 16 * 24 + 24
    parameters = {"gaussian": 24 + 24 * 24, "prototype": 24}.get(kind, network) + 3
    assert (locator_size(settings, 24).parameters, locator_size(settings, 24).bytes) == (parameters, 4 * parameters)


def test_the_sites_that_grow_are_as_many_as_asked_for_and_spread_over_the_depth():
    sites = [f"layer {index}" for index in range(10)]
    first, later = growth_of(CmoeSettings(), sites, 2, 5)
    assert list(first) == sites and list(later) == sites[::2]
    assert growth_of(CmoeSettings(), sites, 1, 0) == (first,)


@pytest.mark.parametrize(
    ("probe", "expected"),
    [({"alpha": 0.25}, 19), ({"alpha": 0}, 16), ({"alpha": 1}, 27), ({"scope": "all"}, 32), ({"scope": "none"}, 0)],
)
def test_eq_2_makes_this_many_of_32_layers_likely(probe: dict[str, object], expected: int):
    assert expected_sites(ProbeSettings.model_validate(probe), 32) == expected


def test_the_recipe_of_coin_trains_about_the_papers_mean(cmoe_7b: Cmoe):
    recipe = load_recipe(shipped("train/recipes/coin_cmoe_llava_7b.yaml"))
    assert isinstance(recipe.method, CmoeSettings)
    sites = list(cmoe_7b.host.banks)
    growth = growth_of(recipe.method, sites, 8, expected_sites(recipe.method.probe, len(sites)))
    sizes = task_sizes(recipe, growth)
    assert sum(size.trained.parameters for size in sizes) / 8 == pytest.approx(PAPER_MEAN, rel=0.02)
