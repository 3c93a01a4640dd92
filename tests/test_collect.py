"""`eval/collect.py` turns finished runs into the committed documents; a run that has nothing to give is named."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Lesson

from llava_cmoe.analyses.expert_similarity import measure_similarity
from llava_cmoe.merging.search import merge_run
from llava_cmoe.merging.summary import MergeSummary
from llava_cmoe.report.headline import Headline
from llava_cmoe.report.studies import read_study

SCRIPT = Path(__file__).parents[1] / "eval/collect.py"
STUDY = Path(__file__).parents[1] / "eval/results/study_sites.json"


@pytest.fixture
def collect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Exit status of the script with these arguments."""

    def start(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["eval/collect.py", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return int(left.value.code or 0)

    return start


def test_runs_become_a_headline_over_methods(lesson_of: Callable[..., Lesson], collect, tmp_path: Path):
    runs = [lesson_of(method).recipe.run for method in ("cmoe", "sequential_lora")]
    out = tmp_path / "new/headline.json"
    assert collect("headline", *runs, "--out", out) == 0
    found = Headline.model_validate_json(out.read_bytes())
    assert list(found.rows) == ["cmoe", "sequential_lora"]
    assert collect("headline", runs[0], runs[0], "--out", tmp_path / "twice.json") == 2  # the same seed twice


def test_a_study_is_copied_byte_for_byte(collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "sites").mkdir()
    shutil.copy(STUDY, tmp_path / "sites/study.json")
    assert collect("study", tmp_path / "sites", "--out", tmp_path) == 0
    assert (tmp_path / "study_sites.json").read_bytes() == STUDY.read_bytes()
    (tmp_path / "sites/study.json").write_text("{}")
    assert collect("study", tmp_path / "sites", "--out", tmp_path) == 2
    assert "not the summary of a study" in capsys.readouterr().err


NAMES = st.sampled_from(["../x", "a/b", "/x", "a/../../x", "a\\b", "", " ", "a\0b", "a\nb", "x" * 300, "\x1b[2J",
                         None, 3, [], {}, ["a"]])  # fmt: skip


@settings(max_examples=17, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES | st.text(st.sampled_from("/\\\0\n"), min_size=1))
def test_a_studys_name_leads_nowhere_else(collect, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: object):
    folder = tmp_path / "inner/study"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps({**(document := json.loads(STUDY.read_text())),
                                                   "study": {**document["study"], "name": name}}))  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    assert collect("study", folder, "--out", tmp_path / "inner") == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("key", ["name", "recipe", "common", "seeds"])
def test_a_study_that_lacks_what_is_shown_is_refused(tmp_path: Path, key: str):
    document = json.loads(STUDY.read_text())
    del document["study"][key]
    (tmp_path / "study.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"study: `{key}`") as raised:
        read_study(tmp_path / "study.json")
    assert "\n" not in str(raised.value)


def test_the_last_merge_of_a_run_is_taken(lesson_of: Callable[..., Lesson], collect, tmp_path: Path):
    lesson = lesson_of("cmoe", "data.train_rows=18")
    run, out = Path(shutil.copytree(lesson.recipe.run, tmp_path / "run")), tmp_path / "merges.json"
    recipe = lesson.recipe.model_copy(update={"run": run})
    assert collect("merges", run, "--out", out) == 2 and not out.exists()  # nothing is merged yet
    merge_run(recipe, bound=0.0, num_rows=2)
    merge, _ = merge_run(recipe, bound=1e9, num_rows=2)
    assert collect("merges", run, "--out", out) == 0
    assert [(one.run, one.seed, one.merge) for one in MergeSummary.model_validate_json(out.read_bytes()).runs] == [
        ("run", 0, merge)
    ]


def test_experts_of_a_run_are_compared(lesson_of: Callable[..., Lesson], collect, tmp_path: Path):
    run, out = lesson_of("cmoe").recipe.run, tmp_path / "diversity.json"
    assert collect("similarity", run, "--out", out) == 0
    assert json.loads(out.read_text()) == measure_similarity(run).model_dump(mode="json")
    assert collect("similarity", tmp_path, "--out", out) == 2
