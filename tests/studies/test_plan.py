"""A study is refused with its file and the key to mend before anything is learned, or all its runs are known."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from llava_cmoe.data.problems import DataError
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.recipes import load_recipe, shipped
from llava_cmoe.studies.plan import Study, plan_studies

SHIPPED = sorted(shipped("train/recipes/studies").glob("*.yaml"))
VARIANTS = {"everywhere": ["method.probe.scope=all"], "nowhere": ["method.probe.scope=none"]}


@pytest.fixture
def written(tmp_path: Path, tiny_data: Path, tiny_backbone: Path) -> Callable[..., Path]:
    """Writes a study of the tiny recipe."""
    tiny.recipe(tmp_path / "unused", tiny_data, tiny_backbone)

    def write(file: str = "study.yaml", **changes: Any) -> Path:
        document = {"name": "where", "recipe": str(tmp_path / "recipe.yaml"), "variants": VARIANTS} | changes
        (tmp_path / file).write_text(yaml.safe_dump(document, sort_keys=False))
        return tmp_path / file

    return write


def test_a_grid_is_the_product_of_its_values_after_the_named_variants():
    study = Study(
        name="x",
        recipe="r",
        variants={"plain": ()},
        grid={"method.experts.rank": (4, 8), "data.train_rows": (None, 10), "method.probe.alpha": (0.5,)},
    )
    variants = study.all_variants()
    assert list(variants) == [
        "plain",
        *("rank_4-train_rows_None-alpha_0.5", "rank_4-train_rows_10-alpha_0.5"),
        *("rank_8-train_rows_None-alpha_0.5", "rank_8-train_rows_10-alpha_0.5"),
    ]
    assert variants["rank_8-train_rows_None-alpha_0.5"] == (
        "method.experts.rank=8",
        "data.train_rows=null",
        "method.probe.alpha=0.5",
    )


def test_every_run_is_what_its_words_make_of_the_recipe(written: Callable[..., Path], tmp_path: Path):
    file = written(common=["training.epochs=2"], seeds=[3, 5], grid={"method.experts.rank": [2]})
    [plan] = plan_studies([file], tmp_path / "a: b # c")
    assert [run.name for run in plan.runs] == [
        f"where/{variant}_{seed}" for variant in ("everywhere", "nowhere", "rank_2") for seed in (3, 5)
    ]
    for run in plan.runs:
        path, *overrides = run.words
        assert load_recipe(Path(path), overrides) == run.recipe
        assert run.recipe.run.parent == plan.folder == tmp_path / "a: b # c" / "where"
        assert run.recipe.training.epochs == 2 and run.log.parent == plan.folder
    assert (plan.runs[5].recipe.seed, plan.runs[5].recipe.method.experts.rank) == (5, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comon": []}, "study.yaml: unknown key comon; did you mean common?"),
        ({"name": "../up"}, "study.yaml: name: string should match"),
        ({"seeds": []}, "study.yaml: seeds: "),
        ({"seeds": [1, 1]}, "study.yaml: seeds: a seed occurs twice"),
        ({"grid": {"seed": []}}, "study.yaml: grid.seed: "),
        ({"variants": {}}, "study.yaml: nothing is varied"),
        ({"variants": {"a b": []}}, "study.yaml: variant 'a b' cannot name a folder"),
        ({"grid": {"data.tasks": [["gqa"]]}}, """study.yaml: variant "tasks_['gqa']" cannot name a folder"""),
        ({"variants": {"rank_4": []}, "grid": {"method.experts.rank": [4]}}, "two variants are named rank_4"),
        ({"common": ["seed=1"]}, "study.yaml: override 'seed=1': a study names its runs itself"),
        ({"variants": {"a": ["run=x"]}}, "study.yaml: override 'run=x': a study names its runs itself"),
        ({"variants": {"a": ["seed"]}}, "study.yaml: override 'seed': "),
        ({"variants": {"a": ["method.prob.alpha=1"]}}, "unknown key method.prob; did you mean method.probe?"),
        ({"variants": {"a": ["data.tasks=[side]"]}}, "study.yaml: variant a: sequence tiny: unknown task side; did"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml: cannot read the file"),
    ],
)
def test_what_cannot_be_used_is_refused_by_file_and_key(written: Callable[..., Path], tmp_path, changes, message: str):
    file = written(**changes)
    with pytest.raises(RecipeError, match=re.escape(message)) as refused:
        plan_studies([file], tmp_path / "studies")
    assert str(refused.value).startswith(str(file)) and not (tmp_path / "studies").exists()


def test_runs_that_differ_in_the_locator_alone_share_the_experts_of_the_first(written: Callable[..., Path], tmp_path):
    variants = {
        "vae": [],
        "gaussian": ["method.locator.kind=gaussian"],
        "small": ["method.experts.rank=2"],
        "small_gaussian": ["method.experts.rank=2", "method.locator.kind=gaussian", "evaluation.routes=[located]"],
        "lora": ["method={name: sequential_lora}"],
        "lora_again": ["method={name: sequential_lora}", "evaluation.routes=[oracle]"],
    }
    [plan] = plan_studies([written(variants=variants, seeds=[1, 2])], tmp_path)
    sources = {run.recipe.run.name: run.source and run.source.recipe.run.name for run in plan.runs}
    assert {name: source for name, source in sources.items() if source} == {
        f"{name}_{seed}": f"{source}_{seed}"
        for seed in (1, 2)
        for name, source in (("gaussian", "vae"), ("small_gaussian", "small"))
    }
    files = [written(), written("other.yaml", name="other", variants={"all": ["method.probe.scope=all"]})]
    *_, shared = (run for plan in plan_studies(files, tmp_path) for run in plan.runs)
    assert shared.name == "other/all_0" and shared.source and shared.source.name == "where/everywhere_0"


def test_two_studies_of_one_name_are_refused(written: Callable[..., Path], tmp_path: Path):
    with pytest.raises(RecipeError, match="two studies have one name among where, where"):
        plan_studies([written(), written("other.yaml", seeds=[1])], tmp_path)


def test_data_that_one_run_would_miss_is_refused(written: Callable[..., Path], tmp_path: Path, tiny_data: Path):
    root = Path(shutil.copytree(tiny_data, tmp_path / "root"))
    lost = root / "Instructions_Original/sides/test.json"
    lost.unlink()
    file = written(variants={"there": [], "lost": [f"data.root={root}"]})
    with pytest.raises(DataError, match=re.escape(str(lost))):
        plan_studies([file], tmp_path / "studies")
    with pytest.raises(DataError, match="nowhere"):
        plan_studies([written(common=[f"data.root={tmp_path / 'nowhere'}"])], tmp_path / "studies")


def test_a_study_whose_runs_were_begun_otherwise_is_refused(written: Callable[..., Path], tmp_path: Path):
    [plan] = plan_studies([written()], tmp_path / "studies")
    begun = plan.runs[1].recipe
    Registry(begun.run, writer=True).open_run(begun)
    plan_studies([written()], tmp_path / "studies")
    with pytest.raises(RegistryError, match=r"nowhere_0.*begun with another recipe: training.epochs"):
        plan_studies([written(common=["training.epochs=2"])], tmp_path / "studies")


def test_every_shipped_study_can_run_and_says_of_how_many_rows(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plans = plan_studies(SHIPPED, Path("runs/studies"))
    assert [plan.study.name for plan in plans] == [path.stem for path in SHIPPED] and len(plans) >= 6
    for path, plan in zip(SHIPPED, plans, strict=True):
        first = " ".join(line[2:] for line in path.read_text().splitlines() if line.startswith("#"))
        assert all(str(run.recipe.data.train_rows) in first for run in plan.runs) and " training rows each" in first
        kinds = {json.dumps(run.recipe.model_dump(mode="json", exclude={"run"})) for run in plan.runs}
        assert len(kinds) == len(plan.runs)  # no variant is another one under a second name


def test_what_reads_test_questions_shares_neither_seed_nor_data_with_what_settings_are_chosen_by(tmp_path: Path):
    runs = [run.recipe for plan in plan_studies(SHIPPED, tmp_path) for run in plan.runs]
    chosen, read = ([run for run in runs if (run.evaluation.split == "validation") == on] for on in (True, False))
    assert chosen and read
    for facts in (lambda run: run.seed, lambda run: run.data.root, lambda run: run.data.pocket_seed):
        assert not {facts(run) for run in chosen} & {facts(run) for run in read}


def test_every_method_is_given_as_many_trials():
    [trials] = [path for path in SHIPPED if path.stem == "trials"]
    num = Counter(run.recipe.method.name for run in plan_studies([trials], Path("x"))[0].runs)
    assert len(num) > 6 and len(set(num.values())) == 1


def test_a_variant_may_change_another_recipe(written: Callable[..., Path], tmp_path: Path, tiny_data, tiny_backbone):
    tiny.recipe(tmp_path / "lora" / "unused", tiny_data, tiny_backbone, "sequential_lora")
    recipes = {"lora": str(tmp_path / "lora/recipe.yaml"), "plain": str(tmp_path / "lora/recipe.yaml")}
    [plan] = plan_studies([written(recipes=recipes, variants=VARIANTS | {"lora": ["method.rank=2"]})], tmp_path / "s")
    named = {run.variant: run.recipe.method.name for run in plan.runs}
    assert named == {"lora": "sequential_lora", "plain": "sequential_lora", "everywhere": "cmoe", "nowhere": "cmoe"}
    assert [run.recipe.method.rank for run in plan.runs if run.variant == "lora"] == [2]
