"""What is wrong with a run is found before its backbone is loaded, and no data file is read twice."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import files_of

from llava_cmoe import sequence
from llava_cmoe.data.conversation import Processor
from llava_cmoe.data.encoding import SampleRows
from llava_cmoe.data.problems import DataError
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs import run as runs
from llava_cmoe.runs.run import open_run
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.run import Recipe

SMALL = ("data.tasks=[sides, colours]", "data.train_rows=4", "data.eval_rows=1", "evaluation.routes=[oracle]")
Make = Callable[..., Recipe]


@pytest.fixture
def root(tiny_data: Path, tmp_path: Path) -> Path:
    """Data whose questions about sides are the longer ones."""
    root = Path(shutil.copytree(tiny_data, tmp_path / "root"))
    file = root / "Instructions_Original/sides/train.json"
    rows = json.loads(file.read_text())
    for row in rows:
        row["conversations"][0]["value"] += " Answer with one letter, and with nothing else."
    file.write_text(json.dumps(rows))
    return root


@pytest.fixture
def make(root: Path, tiny_backbone: Path, tmp_path: Path) -> Make:
    """A recipe of one run folder."""
    return lambda *words: tiny.recipe(tmp_path / "run", root, tiny_backbone, "sequential_lora", *SMALL, *words)


@pytest.fixture
def begun(make: Make) -> Make:
    """The same, where the run has learned its first stage."""
    sequence.learn(make())
    shutil.rmtree(make().run / "tasks/02_colours")
    return make


def refused(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, error: type[Exception], message: str) -> None:
    """Learning stops with this message, no backbone is loaded, and nothing is written."""
    before = files_of(recipe.run)
    monkeypatch.setattr(runs, "load_backbone", lambda *_: pytest.fail("the backbone is loaded"))
    with pytest.raises(error, match=message):
        sequence.learn(recipe)
    assert files_of(recipe.run) == before


def test_another_recipe_is_found_before_the_backbone_is_loaded(begun: Make, monkeypatch: pytest.MonkeyPatch):
    other = begun("training.epochs=2")
    refused(monkeypatch, other, RegistryError, r"another recipe: training.epochs \(was 1.0, now 2.0\)")


def test_other_data_are_found_before_the_backbone_is_loaded(begun: Make, root: Path, monkeypatch: pytest.MonkeyPatch):
    changed = root / "Instructions_Original/colours/test.json"  # of a task that is still to come
    changed.write_text(changed.read_text() + " ")
    refused(monkeypatch, begun(), RegistryError, r"other data than .* holds now: .*colours/test\.json; .*--anyway")


def test_a_broken_row_is_found_before_the_backbone_is_loaded(make: Make, root: Path, monkeypatch: pytest.MonkeyPatch):
    (root / "Instructions_Original/colours/test.json").write_text("[{}]")
    refused(monkeypatch, make(), DataError, r"colours/test\.json")


def lengths(recipe: Recipe, name: str, processor: Processor) -> list[int]:
    """Tokens of the rows of a task that are learned."""
    data = TaskData.open(recipe.data, recipe.seed)
    task = next(task for task in data.sequence.tasks if task.name == name)
    samples = SampleRows(data.train[name], data.encoding(task, processor), max_length=512)
    return [len(samples[index]["input_ids"]) for index in range(len(samples))]


def test_a_long_sample_of_a_later_task_is_found_before_the_backbone_is_loaded_and_the_recipe_on_record(
    make: Make, tiny_processor: Processor, monkeypatch: pytest.MonkeyPatch
):
    first, second = (max(lengths(make(), name, tiny_processor)) for name in ("colours", "sides"))
    assert first < second
    words = ("data.tasks=[colours, sides]", f"training.max_length={first}")
    refused(monkeypatch, make(*words), DataError, rf"sides/train\.json .*at most {first} fit")
    assert not make().run.exists()


def test_only_samples_that_are_still_to_be_learned_may_not_be_too_long(begun: Make, tiny_processor: Processor):
    learned, to_come = (max(lengths(begun(), name, tiny_processor)) for name in ("sides", "colours"))
    assert to_come < learned
    recipe = begun(f"training.max_length={to_come}")
    sequence.learn(recipe, force=True)
    assert [record.name for record in Registry(recipe.run).records()] == ["sides", "colours"]


def test_a_run_parses_its_sequence_once_and_reads_and_hashes_each_file_once(
    begun: Make, root: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: Counter[Path] = Counter()
    plain = Path.open

    def counting(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened[path] += 1
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting)
    run = open_run(begun(), writer=True)
    runs.begin(run)
    sequence.run_stages(run, run.stages, lambda *_: None)
    files = {root / name for name in run.data.files}
    assert len(files) == 4 and {path: opened[path] for path in files} == dict.fromkeys(files, 2)
    assert opened[root / "sequence.yaml"] == 1


@pytest.mark.parametrize("layer", [3, 40, -4])
@pytest.mark.parametrize(
    "setting", ["cmoe method.locator.layer", "lora_per_task method.locator.layer", "care method.layer"]
)
def test_a_layer_that_the_model_has_not_is_found_before_its_weights_are_read(
    tiny_data: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch, setting: str, layer: int
):
    method, key = setting.split()
    recipe = tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, method, f"{key}={layer}")
    refused(monkeypatch, recipe, RecipeError, f"layer {layer} does not exist: this model has 0 .* to 2")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n", b"GIF89a"])
def test_a_picture_that_is_none_is_found_before_a_backbone_is_loaded(
    root: Path, make: Make, monkeypatch, split: str, content: bytes
):
    picture = root / f"cl_dataset/sides/{split}/4.png"
    picture.write_bytes(content)
    recipe = make("data.train_rows=null", "data.eval_rows=null")
    refused(monkeypatch, recipe, DataError, rf"sides/{split}.json \(id sides-{split}-4\): .*4.png: not an image")
