"""Sources are told whole; what the hub serves is asked for by pattern, and a hub out of reach is a plain error."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from llava_cmoe.data.fetch import fetch_sources, patterns_of, render
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.data.tasks import Source


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_every_source_is_told_with_its_page_licence_and_what_is_to_be_done() -> None:
    sequence = load_sequence("coin")
    told = "\n".join(render(sequence, Path("data")))
    assert [source.name for source in sequence.sources if source.name not in told] == []
    assert "Zacks-Chen/CoIN on the Hugging Face Hub" in told and "cc-by-4.0, as its page on the hub says" in told
    assert told.count("see the source") == 7 and "data/cl_dataset/COCO2014" in told


def test_a_licence_that_nobody_stated_is_not_invented() -> None:
    assert Source(name="x", holds="y").licence == "see the source"


def test_instructions_are_fetched_in_the_kind_that_the_tasks_read() -> None:
    diverse = load_sequence("coin_diverse")
    assert patterns_of(diverse.sources[0], diverse) == tuple(f"{folder}/*" for folder in diverse.tasks[0].folder)
    assert patterns_of(Source(name="x", holds="y", files=("RS*",)), diverse) == ("RS*",)


@pytest.mark.parametrize("holds_something", [False, True])
def test_a_hub_out_of_reach_is_told_with_the_command_for_elsewhere(
    tmp_path: Path, offline: None, holds_something: bool
) -> None:
    if holds_something:  # a download into such a folder would pass for one that worked
        (tmp_path / "notes.txt").write_text("mine")
    said: list[str] = []
    [problem] = fetch_sources(load_sequence("coin"), tmp_path, said.append)
    assert said == [] and problem.file == tmp_path
    assert "Zacks-Chen/CoIN cannot be downloaded" in problem.reason
    assert "hf download Zacks-Chen/CoIN --repo-type dataset --include 'Instructions_Original/*'" in problem.reason
