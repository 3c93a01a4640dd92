"""What people type: every command says what it does, does it, and answers a mistake with one clear message."""

import importlib.util
import json
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny
import yaml
from commands import refused, type_in
from tiny import Lesson, files_of
from transformers import PreTrainedModel

from llava_cmoe import api
from llava_cmoe.chat import opening
from llava_cmoe.cli import main
from llava_cmoe.evaluation.log import comparable, read_results
from llava_cmoe.pocket import root as pocket_root
from llava_cmoe.provenance.invocations import bind_results
from llava_cmoe.registry.schema import RunRecord
from llava_cmoe.runs import run as opened
from llava_cmoe.settings.run import Recipe

REPOSITORY = Path(__file__).parents[2]
COMMANDS = {
    "": [
        *("demo", "data", "train", "plan", "convert", "eval", "probe", "merge", "unseen", "report", "study", "chat"),
        *("rescore", "reproduce", "compare", "answers", "serve", "export", "push", "pull"),
    ],
    "serve": ["RUN", "--host", "--port", "--api-key", "LLAVA_CMOE_API_KEY", "--max-queue", "--time-limit"],
    "export": ["RUN", "--task", "--as", "--to", "--merged", "--approximate", "--rows", "Example:"],
    "push": ["RUN", "REPO_ID", "--public", "Example:"],
    "pull": ["REPO_ID", "--to", "--backbone", "--revision", "Example:"],
    "demo": ["--run"],
    "data": ["make-pocket", "check", "fetch"],
    "data make-pocket": ["--seed", "--train-rows", "--test-rows"],
    "data check": ["SEQUENCE", "--root", "--backbone", "--processes"],
    "data fetch": ["SEQUENCE", "--root", "--dry-run"],
    "train": ["recipe", "KEY=VALUE", "--dry-run"],
    "plan": ["recipe", "KEY=VALUE", "--layers", "--length", "--gpus", "--throughput", "--rows", "--json"],
    "convert": ["--llm", "--projector", "--vision", "--out"],
    "study": ["STUDY", "--jobs", "--dry-run"],
    "eval": ["RUN", "--routes", "--batch-size", "--limit", "--subset-seed"],
    "probe": ["RUN", "KEY=VALUE", "--after", "--out"],
    "merge": ["RUN", "--bound", "--rows"],
    "unseen": ["RUN", "--sequence", "--root", "--out"],
    "report": ["RUN", "--out"],
    "rescore": ["RUN", "--root"],
    "reproduce": ["RUN", "--to"],
    "answers": ["export", "import"],
    "answers export": ["RUN", "--to", "--route", "--root"],
    "answers import": ["DIR", "KEY=VALUE", "--recipe", "--run", "--method", "--base"],
    "compare": ["RUN", "--published", "--out", "--root"],
    "chat": ["RUN", "--image", "--prompt", "--questions", "--json", "--route", "--alone", "--after", "--merge"],
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Recipe], Path]:
    """Writes a recipe as the YAML file that people write."""

    def write(settings: Recipe) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        return path

    return write


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("cmoe")


@pytest.fixture
def run(lesson: Lesson, tmp_path: Path) -> Path:
    """A finished run to do anything with."""
    return Path(shutil.copytree(lesson.recipe.run, tmp_path / "run"))


@pytest.fixture
def no_model(lesson_of: Callable[[str], Lesson], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a backbone fails, and whoever loads weights in any other way; two runs are learned before."""
    lesson_of("cmoe"), lesson_of("sequential_lora")

    def fail(*args: object, **words: object) -> None:
        pytest.fail("a model was loaded")

    for module in (opening, opened):
        monkeypatch.setattr(module, "load_backbone", fail)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_everything_a_command_takes(command: str):
    result = type_in(*command.split(), "--help")
    assert result.exit_code == 0
    assert [word for word in COMMANDS[command] if word not in result.output] == []


def test_help_does_not_wait_for_torch():
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    code = f"import sys, llava_cmoe.cli; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("train/continual.py", "train"),
        ("eval/evaluate.py", "eval"),
        ("eval/report.py", "report"),
        ("eval/chat.py", "chat"),
    ],
)
def test_a_script_is_its_command(script: str, command: str, monkeypatch, capsys):
    outputs = []
    for start in (lambda: runpy.run_path(str(REPOSITORY / script), run_name="__main__"), lambda: main(command)):
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit, match="0"):
            start()
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and f"llava-cmoe {command}" in outputs[0]


def test_an_unknown_key_is_answered_with_the_nearest_known_one():
    told = refused("train", REPOSITORY / "train/recipes/pocket_cmoe.yaml", "method.prob.alpha=1", "--dry-run")
    assert "unknown key method.prob; did you mean method.probe?" in told


def test_a_study_is_checked_whole_before_it_begins(written, lesson, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variants = {"fine": [], "broken": ["method.probe.alfa=1"]}
    study = {"name": "alpha", "recipe": str(written(lesson.recipe)), "variants": variants}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    told = refused("study", "study.yaml")
    assert "study.yaml: variant broken: " in told and "did you mean method.probe.alpha?" in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", ["cmoe", "sequential_lora"])
def test_a_dry_run_tells_what_training_then_trains(method, lesson_of, written, tmp_path):
    learned = lesson_of(method)
    fresh = learned.recipe.model_copy(update={"run": tmp_path / "run"})
    result = type_in("train", written(fresh), "--dry-run", "seed=7")
    assert result.exit_code == 0, result.output
    document, _, tables = result.output.partition("\n\n")
    assert yaml.safe_load(document) == fresh.model_copy(update={"seed": 7}).model_dump(mode="json")
    trained = learned.results.trainable_parameters["colours"]
    assert f"{trained:,}" in tables
    rows = [line.replace("│", " ").split() for line in tables.splitlines()]
    assert ["colours", "colours", "24", "6"] in rows and ["sides", "sides", "24", "6"] in rows
    assert not fresh.run.exists()


def test_a_dry_run_without_data_says_so(lesson, written, tmp_path):
    root = tmp_path / "nowhere"
    result = type_in("train", written(lesson.recipe), "--dry-run", f"data.root={root}", f"run={tmp_path / 'run'}")
    assert result.exit_code == 0, result.output
    assert f"{root} does not exist: training needs it" in result.output
    assert (
        "rendered first"
        in type_in("train", written(lesson.recipe), "--dry-run", "data.sequence=pocket", f"data.root={root}").output
    )


def test_training_a_finished_run_again_changes_nothing(lesson, run, written):
    before = files_of(run / "tasks")
    result = type_in("train", written(lesson.recipe.model_copy(update={"run": run})))
    assert result.exit_code == 0, result.output
    assert files_of(run / "tasks") == before
    assert comparable(read_results(run / "results.json")) == comparable(lesson.results)
    assert "locator accuracy" in result.output


def test_training_renders_a_pocket_sequence_that_is_missing(lesson, written, tmp_path, monkeypatch):
    rendered: list[Path] = []
    monkeypatch.setattr(api, "make_pocket_root", lambda root, progress, seed: rendered.append(root))
    monkeypatch.setattr(api, "learn_recipe", lambda recipe, progress, force: lesson.results)
    path, root = written(lesson.recipe), tmp_path / "pocket"
    assert type_in("train", path, "data.sequence=pocket", f"data.root={root}").exit_code == 0
    assert rendered == [root]
    root.mkdir()
    assert type_in("train", path, "data.sequence=pocket", f"data.root={root}").exit_code == 0
    assert type_in("train", path, f"data.root={tmp_path / 'mine'}").exit_code == 0
    assert rendered == [root]


def test_another_recipe_on_a_begun_run_is_refused(run, lesson, written):
    path = written(lesson.recipe.model_copy(update={"run": run}))
    assert "method.locator.beta" in refused("train", path, "method.locator.beta=0.5")


def test_a_broken_override_is_refused_by_its_text(written, lesson):
    told = refused("train", written(lesson.recipe), "--dry-run", "data.tasks=[colours")
    assert "'data.tasks=[colours'" in told


def test_a_sample_that_is_too_long_is_refused_before_the_run_begins(written, lesson, tmp_path):
    path = written(lesson.recipe.model_copy(update={"run": tmp_path / "run"}))
    told = refused("train", path, "training.max_length=20")
    assert re.search(r"colours/train\.json \(id colours-train-0\): sample of \d\d tokens; at most 20 fit", told)
    assert "training.max_length" in told
    assert not (tmp_path / "run").exists()  # so that the same run may begin with a larger limit


def test_a_run_goes_on_only_with_the_data_it_began_with(written, tiny_data, tiny_backbone, tmp_path):
    root = Path(shutil.copytree(tiny_data, tmp_path / "root"))
    words = ("data.tasks=[colours]", "evaluation.routes=[oracle]")
    path = written(tiny.recipe(tmp_path / "run", root, tiny_backbone, "sequential_lora", *words))
    assert type_in("train", path).exit_code == 0
    [learned] = (tmp_path / "run" / "tasks").iterdir()
    changed = root / "Instructions_Original/colours/test.json"
    changed.write_text(changed.read_text() + " ")
    for command in (("train", path), ("eval", tmp_path / "run")):
        told = refused(*command)
        assert "begun with other data" in told and str(root) in told
        assert "Instructions_Original/colours/test.json" in told and "train.json" not in told
    begun = tmp_path / "run" / "run.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"sources": None, "sha256": ""}))  # an older run
    told = refused("eval", tmp_path / "run")
    assert "colours was learned from other data" in told and str(root) in told
    assert json.loads((learned / "record.json").read_text())["data_fingerprint"][:12] in told
    picture = next((root / "cl_dataset" / "colours").rglob("*.png"))
    asked = type_in("chat", tmp_path / "run", "--image", picture, "--prompt", "Which colour?")
    assert asked.exit_code == 0, asked.output  # it reads no rows


def test_a_misspelt_scorer_is_refused_before_anything_is_learned(written, lesson, tmp_path):
    document = yaml.safe_load(Path(lesson.recipe.data.sequence).read_text())
    document["tasks"][-1]["scorer"] = "imagenett"
    sequence_file = tmp_path / "sequence.yaml"
    sequence_file.write_text(yaml.safe_dump(document))
    path = written(lesson.recipe.model_copy(update={"run": tmp_path / "run"}))
    told = refused("train", path, f"data.sequence={sequence_file}")
    assert "'imagenett'" in told and "imagenet," in told
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_is_not_there_is_refused(lesson, written, tmp_path):
    path = written(lesson.recipe)
    assert "backbone.path" in refused("train", path, "--dry-run", "backbone.path=not/a/model/folder")


def test_evaluating_measures_what_is_learned_and_learns_nothing(lesson, run):
    for later in ("tasks/02_sides", "answers/after_02"):
        shutil.rmtree(run / later)
    (run / "results.json").unlink()
    before = files_of(run / "tasks")
    result = type_in("eval", run)
    assert result.exit_code == 0, result.output
    assert files_of(run / "tasks") == before
    measured = read_results(run / "results.json")
    assert measured.headline.matrix == lesson.results.headline.matrix[:1]
    assert list(measured.routes) == ["located", "oracle", "random"]


def test_answers_of_a_task_that_was_taken_back_are_neither_counted_nor_kept(lesson, run, written):
    shutil.rmtree(run / "tasks" / "02_sides")
    answers = run / "answers/after_02/sides.oracle.jsonl"
    own = answers.read_text()
    stale = [json.loads(line) | {"text": "stale"} for line in own.splitlines()]
    answers.write_text("".join(f"{json.dumps(line)}\n" for line in stale))
    assert type_in("eval", run).exit_code == 0
    assert len(read_results(run / "results.json").routes["oracle"].matrix) == 1
    result = type_in("train", written(lesson.recipe.model_copy(update={"run": run})))
    assert result.exit_code == 0, result.output
    assert answers.read_text() == own
    assert comparable(read_results(run / "results.json")) == comparable(lesson.results)


def test_another_batch_size_measures_the_same_run(lesson, run):
    shutil.rmtree(run / "answers/after_02")
    assert type_in("eval", run, "--batch-size", "2").exit_code == 0
    assert comparable(read_results(run / "results.json")) == comparable(lesson.results)


def test_routes_are_measured_beside_those_of_the_recipe(lesson_of, tmp_path, tiny_data, tiny_backbone):
    learned = lesson_of("sequential_lora")
    run = Path(shutil.copytree(learned.recipe.run, tmp_path / "run"))
    begun = json.loads((run / "run.json").read_text())
    begun["recipe"]["evaluation"]["routes"] = ["oracle"]
    (run / "run.json").write_text(RunRecord.model_validate(begun).sealed().to_json())
    assert type_in("eval", run, "--routes", "random,oracle").exit_code == 0
    assert list(read_results(run / "results.json").routes) == ["oracle", "random"]


def test_evaluating_refuses_what_it_cannot_measure(run, tmp_path):
    assert "run.json" in refused("eval", tmp_path / "nothing")
    assert "orcle" in refused("eval", run, "--routes", "orcle")
    assert "--batch-size: expected" in refused("eval", run, "--batch-size", "0")
    shutil.rmtree(run / "tasks")
    assert "nothing is learned yet" in refused("eval", run)


@pytest.mark.parametrize(
    ("method", "words", "answer"),
    [
        ("cmoe", ("merge",), "none is held out"),
        ("cmoe", ("probe", "--after", 3), "2 stages are learned, not 3; name 1 to 2"),
        ("cmoe", ("probe", "method.prob.alpha=0"), "did you mean method.probe?"),
        ("cmoe", ("unseen", "--sequence", "SEQUENCE"), "colours is learned"),
        ("cmoe", ("eval", "--routes", "orcle"), "orcle"),
        ("cmoe", ("eval", "--limit", 0), "limit"),
        ("cmoe", ("chat", "--merge", 9), "there is no merge 9; there is none yet"),
        ("cmoe", ("chat", "--after", 99), "2 stages are learned, not 99"),
        ("cmoe", ("chat", "--route", "oracle:cats", "--prompt", "x"), "oracle:colours"),
        ("cmoe", ("chat", "--route", "orcle", "--prompt", "x"), "located, base"),
        ("sequential_lora", ("merge",), "no pool of experts"),
        ("sequential_lora", ("probe",), "does not probe"),
        ("sequential_lora", ("unseen",), "does not locate"),
        ("sequential_lora", ("chat", "--merge", 9), "there is no merge 9; there is none yet"),
        ("sequential_lora", ("chat", "--route", "base", "--prompt", "x"), "answers alike for all tasks"),
        ("sequential_lora", ("chat", "--after", 99), "2 stages are learned, not 99"),
    ],
)
def test_a_mistake_that_needs_no_model_is_answered_before_one_is_loaded(
    method, words, answer, lesson_of, tiny_data, no_model
):
    command, *options = (tiny_data / "sequence.yaml" if word == "SEQUENCE" else word for word in words)
    assert answer in refused(command, lesson_of(method).recipe.run, *options)


@pytest.mark.parametrize("method", ["cmoe", "sequential_lora"])
@pytest.mark.parametrize("command", ["merge", "probe", "unseen", "eval"])
def test_a_run_that_learned_nothing_is_refused_before_a_model_is_loaded(command, method, lesson_of, tmp_path, no_model):
    run = Path(shutil.copytree(lesson_of(method).recipe.run, tmp_path / "run"))
    shutil.rmtree(run / "tasks")
    before = files_of(tmp_path)
    told = refused(command, run, *(("--root", tmp_path / "unseen") if command == "unseen" else ()))
    if method == "cmoe" or command == "eval":
        assert f"{run}: nothing is learned yet" in told
    else:
        assert "method sequential_lora" in told
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("command", ["merge", "probe", "unseen", "eval", "chat"])
def test_a_folder_that_is_no_run_is_refused_before_a_model_is_loaded(command, tmp_path, no_model):
    assert "run.json" in refused(command, tmp_path)


def test_a_report_draws_what_a_run_has(lesson, lesson_of, tmp_path):
    plain = lesson_of("sequential_lora")
    result = type_in("report", lesson.recipe.run, "--out", tmp_path / "one")
    assert result.exit_code == 0, result.output
    assert names_in(tmp_path / "one") == files_of_report("confusion", "growth")
    assert type_in("report", plain.recipe.run, "--out", tmp_path / "two").exit_code == 0
    assert names_in(tmp_path / "two") == files_of_report()
    both = type_in("report", plain.recipe.run, lesson.recipe.run, "--out", tmp_path / "both")
    assert "sequential_lora" in both.output and "cmoe" in both.output
    assert names_in(tmp_path / "both") == files_of_report("comparison", "confusion_run_2", "growth_run_2")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def files_of_report(*figures: str) -> set[str]:
    drawn = {f"{name}.{kind}" for name in ("matrix", "forgetting", *figures) for kind in ("png", "svg")}
    return {"report.html", "tables.md", "tables.tex", *drawn}


def test_a_report_of_nothing_says_how_to_get_results(run):
    (run / "results.json").write_text("{}")
    bind_results(run)
    assert "not a results file" in refused("report", run)
    (run / "results.json").unlink()
    assert f"llava-cmoe eval {run}" in refused("report", run)


def test_chat_says_which_task_it_located_and_answers(lesson, tiny_data):
    picture = next((tiny_data / "cl_dataset" / "sides").rglob("*.png"))
    result = type_in("chat", lesson.recipe.run, "--image", picture, "--prompt", "Which side?", "--after", "1")
    assert result.exit_code == 0, result.output
    assert "colours, score " in result.output.splitlines()[0]


def test_chat_refuses_a_picture_or_a_stage_that_is_not_there(lesson, tiny_data, tmp_path):
    picture = next((tiny_data / "cl_dataset" / "sides").rglob("*.png"))
    assert "missing" in refused("chat", lesson.recipe.run, "--image", tmp_path / "no.png", "--prompt", "Which side?")
    assert "2 stages are learned, not 3" in refused("chat", lesson.recipe.run, "--image", picture, "--after", "3")


def test_check_leaves_with_status_1_exactly_if_training_would_fail(tiny_data, tmp_path):
    root = Path(shutil.copytree(tiny_data, tmp_path / "root"))
    words = ("data", "check", root / "sequence.yaml", "--root", root, "--processes", 1)
    assert type_in(*words).exit_code == 0
    lost = next((root / "cl_dataset").rglob("*.png"))
    lost.unlink()
    result = type_in(*words)
    assert result.exit_code == 1 and f"{lost} " in result.output.replace(")", " ")
    shutil.rmtree(root / "Instructions_Original")
    result = type_in(*words)
    assert result.exit_code == 1 and "no instruction folder" in result.output


def test_check_counts_the_problems_it_does_not_spell_out(tiny_data, tmp_path):
    root = Path(shutil.copytree(tiny_data, tmp_path / "root"))
    words = ("data", "check", root / "sequence.yaml", "--root", root, "--processes", 1)
    for picture in (root / "cl_dataset" / "sides").rglob("*.png"):
        picture.unlink()
    result = type_in(*words)
    assert result.output.count("is missing") == 20 and "and 10 more" in result.output
    assert "training would fail: 30 problems" in result.output
    shutil.rmtree(root / "cl_dataset" / "sides")
    result = type_in(*words)
    assert result.output.count("is missing") == 2 and "(and 23 rows more)" in result.output


def test_check_shows_an_example_of_each_task_with_what_is_learned_marked(tiny_data):
    result = type_in("data", "check", tiny_data / "sequence.yaml", "--root", tiny_data, "--processes", 1)
    assert result.exit_code == 0, result.output
    assert result.output.count(" tokens⟧ of ") == result.output.count("ASSISTANT:⟦") == 2
    assert "training and evaluation can read everything" in result.output


def test_check_names_a_scorer_that_does_not_exist(tiny_data, tmp_path):
    document = yaml.safe_load((tiny_data / "sequence.yaml").read_text())
    document["tasks"][1]["scorer"] = "scienecqa"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(document))
    result = type_in("data", "check", tmp_path / "mine.yaml", "--root", tiny_data, "--processes", 1)
    assert result.exit_code == 1 and "task sides: unknown scorer 'scienecqa'" in result.output


def test_fetch_tells_all_sources_and_fails_where_the_hub_is_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "by hand" in type_in("data", "fetch", "coin", "--root", tmp_path, "--dry-run").output
    result = type_in("data", "fetch", "coin", "--root", tmp_path)
    assert result.exit_code == 1 and "hf download Zacks-Chen/CoIN" in result.output
    assert type_in("data", "fetch", "pocket", "--root", tmp_path).exit_code == 0


def test_check_of_an_unknown_sequence_names_the_nearest():
    assert "did you mean pocket?" in refused("data", "check", "pockt")


def test_one_seed_renders_one_tree_and_another_seed_another(tmp_path):
    trees = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        size = ("--train-rows", 2, "--test-rows", 1)
        result = type_in("data", "make-pocket", tmp_path / name, "--seed", seed, *size)
        assert result.exit_code == 0, result.output
        trees.append({path: content for path, (content, _) in files_of(tmp_path / name).items()})
    assert trees[0] == trees[1] != trees[2]
    assert "holds files already" in refused("data", "make-pocket", tmp_path / "one")


def test_rendering_that_is_killed_leaves_no_root_and_can_be_repeated(tmp_path):
    def kill(task: str, done: int, total: int) -> None:
        if task == "GQA":
            raise KeyboardInterrupt

    root = tmp_path / "data" / "pocket"
    with pytest.raises(KeyboardInterrupt):
        pocket_root.make_pocket_root(root, kill, train_rows=2, test_rows=1)
    assert not root.exists()
    pocket_root.make_pocket_root(root, lambda *_: None, train_rows=1, test_rows=1)
    assert [path.name for path in root.parent.iterdir()] == ["pocket"]
    assert len(json.loads((root / "Instructions_Original/ScienceQA/train.json").read_text())) == 1


def test_scoring_again_tells_how_many_accuracies_changed(run, tmp_path):
    before = (run / "results.json").read_bytes()
    result = type_in("rescore", run)
    assert result.exit_code == 0 and "accuracies that changed: 0" in result.output, result.output
    assert (run / "results.json").read_bytes() == before
    assert "other data" in refused("rescore", run, "--root", broken_root(tmp_path, run))


def broken_root(folder: Path, run: Path) -> Path:
    """A copy of a run's data root with one byte more."""
    root = Path(shutil.copytree(read_results(run / "results.json").recipe["data"]["root"], folder / "other"))
    with (root / "Instructions_Original/sides/test.json").open("a") as stream:
        stream.write(" ")
    return root


def test_a_comparison_is_shown_and_written(run, tmp_path):
    result = type_in("compare", run, "--published", "coin_llava_7b", "--out", tmp_path / "comparison")
    assert result.exit_code == 0, result.output
    assert "moelora_8" in result.output and "warning: base: " in result.output
    written = sorted(path.name for path in (tmp_path / "comparison").iterdir())
    assert written == ["comparison.json", "comparison.md", "comparison.png"]
    assert "did you mean" in refused("compare", run, "--published", "coin")


def test_answers_go_out_and_come_in(run, lesson, written, tmp_path):
    assert type_in("answers", "export", run, "--to", tmp_path / "out").exit_code == 0
    (tmp_path / "out/sides/sides/Result.text").write_text("Samples: 6\nAccuracy: 1.50%\n")
    words = ("answers", "import", tmp_path / "out", "--recipe", written(lesson.recipe), "--run", tmp_path / "in")
    result = type_in(*words, "--method", "theirs")
    assert result.exit_code == 0, result.output
    assert "sides after sides: Result.text says 1.50, scored here by coin: " in result.output
    assert read_results(tmp_path / "in/results.json").headline == lesson.results.headline
    assert "holds files already" in refused(*words)


def test_a_subset_is_measured_beside_the_whole_and_marked(run, tmp_path):
    before = files_of(run)
    result = type_in("eval", run, "--limit", 3, "--subset-seed", 1)
    assert result.exit_code == 0, result.output
    assert "subset of 3 (seed 1)" in result.output
    part = run / "subsets/3_1"
    results = read_results(part / "results.json")
    assert results.num_samples == {"colours": 3, "sides": 3}
    assert (results.subset.limit, results.subset.seed, results.subset.of) == (3, 1, {"colours": 6, "sides": 6})
    assert {name: found for name, found in files_of(run).items() if not name.startswith("subsets")} == before
    written = (part / "results.json").read_bytes()
    assert type_in("rescore", part).exit_code == 0 and (part / "results.json").read_bytes() == written
    shutil.rmtree(part)
    assert type_in("eval", run, "--limit", 3, "--subset-seed", 1).exit_code == 0
    assert (part / "results.json").read_bytes() == written
    compared = type_in("compare", run, part)
    assert "differ in subset" in compared.output and "asked other questions" in compared.output
    assert "limit" in refused("eval", run, "--limit", 0)


def test_a_server_names_what_is_missing_before_a_model_is_loaded(run: Path, no_model: None, monkeypatch):
    assert "the key is empty" in refused("serve", run, "--api-key", " ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in refused("serve", run, "--port", taken.getsockname()[1])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *words: None if name == "uvicorn" else find_spec(name, *words)
    )
    said = refused("serve", run)
    assert "serve: uvicorn is missing; pip install 'llava-cmoe[serve]'" in said and said.count("\n") == 1
