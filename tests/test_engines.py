"""Two processes under every engine of `zero_configs/` learn what one process learns without any."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from llava_cmoe import sequence
from llava_cmoe.evaluation.log import read_results
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.recipes import shipped
from llava_cmoe.settings.run import Recipe
from llava_cmoe.training.processes import LaunchError, processes

TESTS = Path(__file__).parent
TASKS = ("colours", "counts")
"""Some rows of the first are text only, answers of the second differ in length."""
ENGINES = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
# AdamW's first steps are the gradients' signs: rounding that turns one moves a weight by two learning rates.
QUICK = ("training.learning_rate=1e-3", "data.train_rows=16", "data.eval_rows=3", "evaluation.routes=[located]")
TOLERANCE = 2e-5
LIMIT = 300
"""Seconds after which a launch counts as hanging; it takes some 15 on two cores."""

Make = Callable[..., Recipe]
REFUSED = ("ewc", "lwf", "o_lora", "reg_lora", "r2moe")
"""Methods that need whole weights, which ZeRO-3 spreads."""
Case = tuple[str, tuple[str, ...]]
"""A method and overrides of its recipe."""
HALF = ("training.batch_size=2",)
"""Of two processes each takes half of what one takes in a step."""
LONGER: Case = ("cmoe", ("training.epochs=2",))
"""8 steps a stage, so that a checkpoint after 5 lies within."""
KILLED: Case = ("cmoe", (*LONGER[1], "training.checkpoint_steps=5"))
"""The same, one process of which dies in its second task before the engine's other cases are learned."""
BF16: Case = ("cmoe", ("training.precision=bf16",))
# The balance term is of a forward pass: what two passes count, no single one has seen.
UNBALANCED = ("method.experts.balance_weight=0", "method.probe.balance_weight=0")
ACCUMULATED: Case = ("cmoe", ("training.batch_size=1", "training.accumulation=2", *UNBALANCED))
BASELINES: dict[str, tuple[str, ...]] = {
    "replay": ("method.fraction=0.25",),
    "ewc": (),
    "lwf": (),
    "o_lora": (),
    "lora_per_task": (),
    "pmoe": ("method.replay=0.25",),
    "r2moe": (),
}
"""Learn the two tasks of `tiny.TASKS`, whose answers are equally long: LwF's distance is a mean over a process's own
tokens. Old rows that are read again fill whole steps: the rows that a short one is filled up with are learned, too.
Fisher sums of two processes differ from those of one as all sums do, in their order."""


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tasks lie."""
    root = tmp_path_factory.mktemp("data")
    tiny.write_data(root, TASKS)
    return root


@pytest.fixture(scope="module")
def make(data_root: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A recipe in a folder of its own."""

    def make(method: str, *overrides: str) -> Recipe:
        run = tmp_path_factory.mktemp(method) / "run"
        store = f"data.feature_store={run.with_name('features')}"
        return tiny.recipe(run, data_root, tiny_backbone, method, *QUICK, store, *overrides)

    return make


@pytest.fixture(scope="module")
def alone(make: Make) -> Callable[..., Recipe]:
    """A recipe that one process has learned without an engine; each once."""

    @cache
    def learned(method: str, *overrides: str) -> Recipe:
        recipe = make(method, *overrides)
        sequence.learn(recipe)
        return recipe

    return learned


@pytest.fixture(scope="module")
def averaging(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Families whose forward takes no number of tokens, or returns the mean of a batch whatever it is told.

    Each process's loss counts by its share of the step's tokens all the same.
    """
    cases: list[Case] = []
    for kind in ("qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"):
        folder = families.make(kind).save(tmp_path_factory.mktemp("family") / kind)
        words = (f"backbone.path={folder}", "data.tasks=[counts]")
        cases.append(("sequential_lora", (*words, *["backbone.attention=eager"] * (kind == "paligemma"))))
    return cases


@pytest.fixture(scope="module")
def together(make: Make, tiny_data: Path, averaging: list[Case]) -> Callable[[str], dict[Case, Recipe]]:
    """What two processes have learned under an engine, by method and overrides; each engine once."""
    two_tasks = (f"data.sequence={tiny_data / 'sequence.yaml'}", f"data.root={tiny_data}")

    @cache
    def learned(engine: str) -> dict[Case, Recipe]:
        # Where states lie is all that ZeRO-1 and offloading change; one method has every kind of tensor.
        cases: list[Case] = [LONGER]
        if engine in ("zero2", "zero3"):
            cases.append(("moelora", ()))
        if engine == "zero3":  # elsewhere replay has its adapter
            cases.append(("sequential_lora", ()))
        # Under ZeRO-3 the one whose router decides for other modules; what all of them share is the others' cases.
        holds = {"ddp": list(BASELINES), "zero2": list(BASELINES), "zero3": ["pmoe"]}.get(engine, [])
        cases += [(name, (*two_tasks, *BASELINES[name])) for name in holds]
        if engine == "zero2":  # the others differ from these in what they do after training
            cases += [(name, two_tasks) for name in ("care", "patch_routing")]
        if engine == "zero3":  # a process's few tokens cannot choose all experts: who waits for one that is not used?
            cases.append(("cmoe", ("method.experts.num_first=4", "method.experts.top_k=1")))
        if engine == "zero2":
            cases += [("cmoe", ("backbone.quantization=nf4",)), ACCUMULATED]
        if engine in ("ddp", "zero2"):
            cases.append(BF16)
        if engine == "ddp":
            cases += averaging
        if engine in ("zero2", "zero3"):
            cases.append(KILLED)
        recipes = {(method, words): make(method, *HALF, *words) for method, words in cases}
        if KILLED in recipes:
            kill(engine, recipes[KILLED])
        launch(engine, list(recipes.values()))
        return recipes

    return learned


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_learn_what_one_does(
    alone: Callable[..., Recipe], together: Callable[[str], dict[Case, Recipe]], engine: str
):
    for (method, overrides), recipe in together(engine).items():
        if (method, overrides) in (BF16, ACCUMULATED, KILLED):  # tests of their own
            continue
        assert_same(alone(method, *overrides), recipe)
        assert read_results(recipe.run / "results.json").processes == 2


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_run_whose_one_process_was_killed_ends_like_one_that_was_not(
    together: Callable[[str], dict[Case, Recipe]], engine: str
):
    whole, killed = (together(engine)[case] for case in (LONGER, KILLED))
    ends = [Registry(recipe.run).records()[-1].sha256 for recipe in (whole, killed)]
    assert ends[0] == ends[1]  # of every tensor and loss, through the chain of records
    assert not (killed.run / "trainer").exists()


def test_accumulated_batches_are_one_batch_and_features_are_kept_once(
    alone: Callable[..., Recipe], together: Callable[[str], dict[Case, Recipe]]
):
    accumulated = together("zero2")[ACCUMULATED]
    assert_same(alone("cmoe", *UNBALANCED), accumulated)
    assert len(list(accumulated.run.with_name("features").iterdir())) == len(TASKS)


def test_bf16_keeps_experts_and_routers_in_float32(together: Callable[[str], dict[Case, Recipe]]):
    spread, plain = (together(engine)[BF16] for engine in ("zero2", "ddp"))
    for index in range(len(TASKS)):
        left, right = (Registry(run.run).load(index) for run in (spread, plain))
        for group in ("experts", "routers"):
            assert {tensor.dtype for tensor in left[group].values()} == {torch.float32}
            torch.testing.assert_close(left[group], right[group], rtol=0, atol=5e-3)  # some five steps


def test_another_number_of_processes_is_an_error_that_names_the_way_on(together: Callable[[str], dict[Case, Recipe]]):
    with pytest.raises(RegistryError, match=r"begun on another number of processes, 2, now it is 1.*--anyway"):
        sequence.learn(together("ddp")[LONGER])


def test_an_engine_that_the_launch_turns_off_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(LaunchError, match="turns DeepSpeed off; leave use_cpu out"):
        sequence.learn(make("sequential_lora"))


@pytest.mark.parametrize("method", tiny.METHODS)
def test_what_an_engine_cannot_hold_is_refused_before_the_backbone_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch, method: str
):
    class Loaded(Exception):
        """The backbone would be loaded now."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise Loaded

    processes()  # of this process, before it believes that DeepSpeed was asked for
    monkeypatch.setattr("llava_cmoe.runs.run.load_backbone", load)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    complaints = {(stage, ()): "" for stage in (2, 3)}
    if method in REFUSED:
        complaints[3, ()] = rf"^{method}.* ZeRO-3 spreads .*; choose zero_configs/zero2\.yaml$"
    if method == "cmoe":
        complaints[3, ("backbone.quantization=nf4",)] = "ZeRO-3 cannot spread weights in nf4"
        complaints[2, ("method.experts.dtype=bfloat16",)] = "experts are in bfloat16, routers in float32"
    for (stage, overrides), complaint in complaints.items():
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
        with pytest.raises(LaunchError, match=complaint) if complaint else pytest.raises(Loaded):
            sequence.learn(make(method, *overrides))


def test_the_configurations_differ_in_what_their_names_say():
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in shipped("zero_configs").glob("*.yaml")}
    assert {*ENGINES, "single", "cpu_debug", "two_nodes"} == set(configs)
    for name, config in configs.items():
        told = config.get("deepspeed_config", {})
        assert (config["distributed_type"] == "DEEPSPEED") == bool(told), name
        assert config["mixed_precision"] == "no" and "use_cpu" not in config, name
        if name in ENGINES:
            stage, offload = (int(name[4]), name.endswith("offload")) if name != "ddp" else (None, False)
            assert told.get("zero_stage") == stage
            assert (told.get("offload_optimizer_device") == "cpu") == offload
            assert (told.get("offload_param_device") == "cpu") == (offload and stage == 3)


def assert_same(one: Recipe, two: Recipe) -> None:
    """Decisions are equal, and tensors and losses but for the order of their sums."""
    left_records, right_records = (Registry(recipe.run).records() for recipe in (one, two))
    for left, right in zip(left_records, right_records, strict=True):
        assert left.facts["growth"]["new_experts"] == right.facts["growth"]["new_experts"]
        assert left.facts["growth"]["frequencies"] == right.facts["growth"]["frequencies"]
        for loss in ("first_loss", "last_loss"):
            assert left.facts["training"][loss] == pytest.approx(right.facts["training"][loss], abs=TOLERANCE)
        folder = f"tasks/{left.index + 1:02d}_{left.name}"
        for name in left.files:
            tensors = [load_file(recipe.run / folder / name) for recipe in (one, two)]
            torch.testing.assert_close(*tensors, rtol=0, atol=TOLERANCE)


def kill(engine: str, recipe: Recipe) -> None:
    """Let one of two processes die beyond the checkpoint of the second task, which grew the pool."""
    steps = 8 + 1 + 6  # the first stage, probing, and that far
    launch(engine, [recipe], fatal={"rank": "1", "call": steps + 1})
    assert [path.name for path in (recipe.run / "tasks").iterdir()] == ["01_colours"]
    stage = recipe.run / "trainer/02_counts/training"
    assert [path.parent.name for path in stage.glob("*/complete.json")] == ["checkpoint-5"]


def launch(engine: str, recipes: list[Recipe], fatal: dict[str, Any] | None = None) -> None:
    """Two processes learn some recipes, one after the other."""
    arguments = [str(TESTS / "launched.py"), *(recipe.model_dump_json() for recipe in recipes)]
    done = started(engine, arguments, FATAL=json.dumps(fatal or {}))
    assert (done.returncode != 0) == (fatal is not None), done.stderr[-4000:]


def started(
    engine: str, arguments: list[str], num_processes: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A launch by a configuration that ships; one that hangs is an error."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(shipped(f"zero_configs/{engine}.yaml"))]
    command += [f"--num_processes={num_processes}", "--main_process_port=0", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT)
