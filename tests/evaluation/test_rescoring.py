"""Scoring again costs no model, changes nothing where nothing changed, and never loses a number silently."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Lesson

from llava_cmoe.evaluation.log import read_answers, read_results, write_answers
from llava_cmoe.evaluation.rescoring import Change, open_examined, rescore
from llava_cmoe.evaluation.scorers import PROTOCOLS, get_scorer, llm_judge
from llava_cmoe.provenance.invocations import bind_results
from llava_cmoe.registry.schema import RegistryError, RunRecord
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs import run as runs
from llava_cmoe.settings.base import RecipeError


@pytest.fixture
def run(lesson_of: Callable[[str], Lesson], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, and no way to load a model."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a model is loaded")

    folder = Path(shutil.copytree(lesson_of("cmoe").recipe.run, tmp_path / "run"))
    monkeypatch.setattr(runs, "load_backbone", refuse)
    return folder


def answer_with(path: Path, text: str) -> None:
    answers = [json.loads(line) | {"text": text} for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(answer)}\n" for answer in answers))


def test_scoring_what_did_not_change_again_gives_the_same_bytes(run: Path) -> None:
    before = (run / "results.json").read_bytes()
    for others in ("tasks", "run.json"):  # answers and results are enough
        (shutil.rmtree if others == "tasks" else Path.unlink)(run / others)
    results, changed = rescore(open_examined(run))
    assert (run / "results.json").read_bytes() == before and changed == []
    assert results == read_results(run / "results.json")


def test_a_run_that_is_only_measured_at_its_end_keeps_its_one_row(
    lesson_of: Callable[[str], Lesson], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(lesson_of("joint").recipe.run, tmp_path / "joint"))
    before = (folder / "results.json").read_bytes()
    rescore(open_examined(folder))
    assert (folder / "results.json").read_bytes() == before


def test_routes_that_were_measured_beside_the_recipes_own_are_scored_too(run: Path) -> None:
    document = json.loads((run / "results.json").read_text())
    document["recipe"]["evaluation"]["routes"] = ["oracle"]
    (run / "results.json").write_text(json.dumps(document))
    bind_results(run)
    assert list(rescore(open_examined(run))[0].routes) == ["located", "oracle", "random"]


@pytest.mark.parametrize("opened", ["rescore", "eval"])
def test_a_judge_that_only_the_run_names_gets_no_key(run: Path, monkeypatch: pytest.MonkeyPatch, opened: str) -> None:
    """Neither by scoring again nor by evaluating: a run folder may be a stranger's."""
    pytest.importorskip("openai")
    judge = {"model": "m", "url": "http://127.0.0.1:9/v1"}
    monkeypatch.setitem(PROTOCOLS["strict"].scorers, "gqa", llm_judge.build)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for name in ("results.json", "run.json"):
        document = json.loads((run / name).read_text())
        document["recipe"]["evaluation"]["judge"] = judge
        (run / name).write_text(json.dumps(document))
    sealed = RunRecord.model_validate_json((run / "run.json").read_bytes()).sealed()
    (run / "run.json").write_text(sealed.to_json())
    bind_results(run)
    if opened == "rescore":
        with pytest.raises(RecipeError, match="set OPENAI_BASE_URL=http://127.0.0.1:9/v1 to send it there"):
            rescore(open_examined(run))
    else:
        evaluation = Registry(run).recipe().evaluation
        with pytest.raises(RecipeError, match="OPENAI_API_KEY is set"):
            get_scorer("gqa", evaluation)


def test_an_answer_that_changed_is_told_and_written(run: Path) -> None:
    before = read_results(run / "results.json")
    was = before.routes["oracle"].matrix[1][0]
    answer_with(run / "answers/after_02/colours.oracle.jsonl", "of no colour" if was else "A")
    results, changed = rescore(open_examined(run, bound=False))
    now = results.routes["oracle"].matrix[1][0]
    assert now == pytest.approx(0 if was else 100 / 3)
    assert changed == [Change("oracle", "sides", "colours", was, now)]
    assert read_results(run / "results.json") == results
    assert results.routes["located"] == before.routes["located"]


def test_a_file_of_the_first_format_gets_what_it_lacks(run: Path) -> None:
    new = (run / "results.json").read_bytes()
    document = json.loads(new) | {"format": 1}
    del document["data_files"], document["bootstrap"]
    for measured in document["routes"].values():
        del measured["intervals"], measured["metric_intervals"]
    (run / "results.json").write_text(json.dumps(document))
    bind_results(run)
    rescore(open_examined(run))
    assert (run / "results.json").read_bytes() == new


def test_other_data_are_refused_by_the_file_that_changed_and_found_where_they_moved(
    run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(tiny_data, tmp_path / "moved"))
    before = (run / "results.json").read_bytes()
    rescore(open_examined(run, moved))
    assert (run / "results.json").read_bytes() == before
    changed = moved / "Instructions_Original/sides/test.json"
    changed.write_text(changed.read_text() + " ")
    with pytest.raises(
        RegistryError, match=r"other data than .*moved holds now \(Instructions_Original/sides/test.json"
    ):
        open_examined(run, moved)


def test_answers_that_are_gone_are_named_and_nothing_is_written(run: Path) -> None:
    before, lost = (run / "results.json").read_bytes(), run / "answers/after_02/sides.random.jsonl"
    lost.unlink()
    with pytest.raises(RegistryError, match=r"sides\.random\.jsonl: is missing"):
        open_examined(run)
    assert (run / "results.json").read_bytes() == before


def test_an_answer_too_few_is_an_error_with_its_id(run: Path) -> None:
    path = run / "answers/after_02/sides.random.jsonl"
    write_answers(path, read_answers(path)[1:])
    with pytest.raises(RegistryError, match="missing id 'sides-test-0'"):
        rescore(open_examined(run, bound=False))


def test_a_folder_without_results_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="llava-cmoe eval"):
        open_examined(tmp_path)
