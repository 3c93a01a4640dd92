"""The results page shows what is committed, and says of what is not that it is not measured."""

import json
import shutil
from pathlib import Path

import pytest

from llava_cmoe.report.results_page import STUDIES, StudyText, results_page
from llava_cmoe.report.studies import read_study

RESULTS = Path(__file__).parents[2] / "eval/results"
SOURCES = {
    "Headline": "pocket.json",
    "Backbone": "pocket_base.json",
    "Merges": "merges.json",
    "Probe report": "calibration.json",
    "Expert similarity": "diversity.json",
    "Unseen inputs": "unseen.json",
    "Cost of a step": "speed_steps.json",
    "Cost against the number of tasks": "speed_tasks.json",
    "Locating and batches": "speed_locating.json",
}


def section(page: str, title: str) -> str:
    [found] = [part for part in page.split("\n## ")[1:] if part.startswith(f"{title}\n")]
    return found


def test_every_section_of_an_empty_folder_says_that_nothing_is_measured(tmp_path: Path):
    page = results_page(tmp_path)
    for title, name in SOURCES.items():
        assert section(page, title).strip() == f"{title}\n\nNot measured yet: there is no `{name}`."
    assert "|" not in page and "![" not in page


@pytest.mark.parametrize("title", SOURCES)
def test_a_section_names_the_file_its_numbers_come_from(title: str):
    assert f"[{SOURCES[title]}](../eval/results/{SOURCES[title]})" in section(results_page(RESULTS), title)


def test_only_the_pairs_of_a_study_with_a_known_name_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(STUDIES, "sites", StudyText("Where?", (("projector", "llm"),)))
    document = json.loads((RESULTS / "study_sites.json").read_text())
    for name in ("sites", "another"):
        document["study"]["name"] = name
        (tmp_path / f"study_{name}.json").write_text(json.dumps(document))
    page = results_page(tmp_path)
    assert "| projector | llm |" in section(page, "Study sites")
    assert "| projector |" in section(page, "Study another") and "minus" not in section(page, "Study another")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("study_*.json")), ids=lambda path: path.stem)
def test_the_compared_variants_of_a_known_study_are_there(path: Path):
    found = read_study(path)
    text = STUDIES.get(found.study["name"])
    assert text is None or {variant for pair in text.pairs for variant in pair} <= found.variants.keys()


def test_numbers_follow_the_document(tmp_path: Path):
    shutil.copy(RESULTS / "diversity.json", tmp_path)
    document = json.loads((tmp_path / "diversity.json").read_text())
    task = list(document["tasks"])[1]
    document["tasks"][task]["to_origin"] = 0.125
    (tmp_path / "diversity.json").write_text(json.dumps(document))
    [line] = [
        line
        for line in section(results_page(tmp_path), "Expert similarity").splitlines()
        if line.startswith(f"| {task}")
    ]
    assert line.split(" | ")[2] == "0.12"
