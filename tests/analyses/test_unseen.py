"""What a run never learned is left to the base model as its thresholds say, and measuring that leaves the run alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from commands import refused, type_in
from datasets import Dataset
from tiny import Lesson, files_of

from llava_cmoe import sequence
from llava_cmoe.analyses import unseen
from llava_cmoe.analyses.unseen import UnseenResults, measure_unseen
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.evaluation.log import Answer
from llava_cmoe.evaluation.scorers import get_scorer
from llava_cmoe.pocket import root as pocket_root
from llava_cmoe.runs import run as runs
from llava_cmoe.settings.evaluation import EvaluationSettings
from llava_cmoe.settings.run import Recipe

ROWS = 4


@pytest.fixture(scope="module")
def ninth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ninth") / "root"
    pocket_root.make_pocket_root(root, lambda *_: None, train_rows=1, test_rows=ROWS, tasks=["Pretraining"])
    return root


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("cmoe")


@pytest.fixture
def asked(ninth: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], tuple[UnseenResults, list[list[str]]]]:
    """Measures a run; what it found, and the texts of both rounds of answers."""
    texts: list[list[str]] = []
    ask_twice = unseen.ask_twice

    def looked_on(*args: object) -> tuple[list[Answer], list[Answer]]:
        both = ask_twice(*args)  # type: ignore[arg-type]
        texts.extend([answer.text for answer in answers] for answers in both)
        return both

    def ask(recipe: Recipe) -> tuple[UnseenResults, list[list[str]]]:
        monkeypatch.setattr(unseen, "ask_twice", looked_on)
        return measure_unseen(recipe, load_sequence("pocket_unseen"), ninth), texts

    return ask


@pytest.mark.parametrize(("threshold", "sent"), [(-1e9, 100), (1e9, 0)])
def test_the_threshold_decides_who_answers(threshold, sent, asked, tiny_data, tiny_backbone, tmp_path):
    locator = (f"method.locator.unseen_threshold={threshold}", "method.locator.epochs=2")
    small = ("data.train_rows=8", "data.eval_rows=3", "evaluation.routes=[oracle]")
    recipe = tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "cmoe", *small, *locator)
    sequence.learn(recipe)
    results, (located, alone) = asked(recipe)
    task = results.unseen["pretraining"]
    assert (task.rows, task.to_base, results.false_rejection_rate) == (ROWS, sent, sent)
    assert sum(task.to_tasks.values()) == 100 - sent
    assert task.lost_at_base == (0 if sent else None)
    assert (located == alone) == bool(sent)  # experts do change these answers
    assert not sent or task.located == task.base_alone


def test_a_measurement_changes_nothing_and_its_false_rejections_are_those_of_the_evaluation(lesson, asked):
    before, places = files_of(lesson.recipe.run), {*lesson.recipe.run.rglob("*")}
    results, _ = asked(lesson.recipe)
    assert files_of(lesson.recipe.run) == before and {*lesson.recipe.run.rglob("*")} == places
    counted = {
        name: 100 * row[-1] / sum(row)
        for name, row in zip(lesson.results.tasks, lesson.results.locator.confusion, strict=True)
    }
    assert results.false_rejections == counted
    same = ("run", "seed", "base", "data", "versions", "threads", "recipe")
    assert all(getattr(results, name) == getattr(lesson.results, name) for name in same)
    assert len(results.unseen_data) == 64 and results.unseen_data != results.data


def test_lost_points_are_counted_where_the_base_model_answered_and_nowhere_else():
    def answers(texts: list[str]) -> list[Answer]:
        return [Answer(str(i), text, task, None, "") for i, (text, task) in enumerate(zip(texts, tasks, strict=True))]

    tasks = [-1, -1, 1, 1]
    turns = [{"role": "user", "text": "?"}]
    blank = {"image": None, "turns": turns, "answers": [], "box": [], "choices": [], "size": []}
    rows = Dataset.from_list([{"id": str(i), "answer": "yes", **blank} for i in range(4)])
    scorer = get_scorer("gqa", EvaluationSettings())
    task = unseen.compared(
        answers(["yes", "no", "no", "no"]), answers(["yes", "yes", "yes", "no"]), rows, scorer, ("a", "b")
    )
    assert (task.to_base, task.to_tasks, task.located, task.base_alone, task.lost_at_base) == (
        50,
        {"b": 50},
        25,
        75,
        50,
    )


def test_the_command_renders_what_is_missing_and_writes_what_it_shows(lesson, tmp_path, monkeypatch):
    make, root, out = pocket_root.make_pocket_root, tmp_path / "data" / "ninth", tmp_path / "unseen.json"
    monkeypatch.setattr(pocket_root, "make_pocket_root", lambda *args, **more: make(*args, **more, test_rows=2))
    result = type_in("unseen", lesson.recipe.run, "--root", root, "--out", out)
    assert result.exit_code == 0, result.output
    assert [path.name for path in (root / "Instructions_Original").iterdir()] == ["Pretraining"]
    written = UnseenResults.model_validate_json(out.read_bytes())
    assert written.learned == lesson.results.tasks and written.unseen["pretraining"].rows == 2
    assert "pretraining" in result.output and f"false rejections: {written.false_rejection_rate:.1f}" in result.output


def test_what_cannot_be_measured_is_refused_before_anything_is_rendered_or_loaded(
    lesson, lesson_of, ninth, tiny_data, tmp_path, monkeypatch
):
    plain = lesson_of("sequential_lora").recipe.run
    begun = Path(shutil.copytree(lesson.recipe.run, tmp_path / "begun"))
    shutil.rmtree(begun / "tasks")
    monkeypatch.setattr(runs, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))
    root = ("--root", tmp_path / "ninth")
    assert "sequential_lora does not locate" in refused("unseen", plain, *root)
    assert "nothing is learned yet" in refused("unseen", begun, *root)
    document = (tiny_data / "sequence.yaml").read_text()
    for known, misspelt in (("colours", "mine"), ("sides", "other"), ("gqa", "gqaa")):
        document = document.replace(f'"{known}"', f'"{misspelt}"')
    (tmp_path / "mine.yaml").write_text(document)
    assert "'gqaa'" in refused("unseen", lesson.recipe.run, "--sequence", tmp_path / "mine.yaml", *root)
    assert "colours is learned" in refused("unseen", lesson.recipe.run, "--sequence", tiny_data / "sequence.yaml")
    assert not (tmp_path / "ninth").exists()
