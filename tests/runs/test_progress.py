"""How far a run is: what is left is computed from what it took, a resumed run goes on, and nothing learned changes."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from commands import type_in
from hypothesis import given
from hypothesis import settings as examples_of_hypothesis
from hypothesis import strategies as st
from tiny import Lesson

from llava_cmoe.evaluation.log import read_results
from llava_cmoe.report.tables import number
from llava_cmoe.runs import progress_page
from llava_cmoe.runs.progress import MOST_LOSSES, Course, Left, Phase, RunProgress, StageProgress, place
from llava_cmoe.runs.progress_page import SECONDS, ProgressPage
from llava_cmoe.sequence import learn

STAGES = ("a", "b", "c")


class Clock:
    """Time as a test lets it pass."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def work(progress: RunProgress, clock: Clock, stage: int, phases: dict[str, float], steps: int = 4) -> None:
    """Go through phases of a stage that take so many seconds."""
    for what, seconds in phases.items():
        for step in range(1, steps + 1):
            clock.now += seconds / steps
            progress(place(stage, STAGES), what, step, steps)


@given(st.lists(st.floats(0.1, 1e5), min_size=3, max_size=3), st.integers(1, 3))
def test_what_is_left_is_what_the_stage_before_took_of_all_that_is_to_come(taken: list[float], step: int):
    clock = Clock()
    progress = RunProgress(Path("nowhere"), STAGES, clock)
    phases = dict(zip(("probing", "training", "answers"), taken, strict=True))
    assert progress.left == Left()
    work(progress, clock, 0, phases)
    assert progress.left == Left(phase=0.0)  # of the later phases of a first stage nothing is known
    for stage in (1, 2):
        clock.now += phases["probing"] / 4 * step
        progress(place(stage, STAGES), "probing", step, 4)
        rest = phases["probing"] * (4 - step) / 4 + phases["training"] + phases["answers"]
        assert progress.left.stage == pytest.approx(rest)
        assert progress.left.sequence == pytest.approx(rest + (2 - stage) * sum(taken))
        clock.now -= phases["probing"] / 4 * step
        work(progress, clock, stage, phases)
        assert progress.left.stage == pytest.approx(0, abs=1e-6 * sum(taken))
    assert [stage.seconds for stage in progress.course.stages] == pytest.approx([sum(taken)] * 3)


def test_places_that_are_no_stage_are_none_of_its_progress(tmp_path: Path):
    progress = RunProgress(tmp_path, STAGES)
    progress("rendering", "a", 1, 2)
    page = ProgressPage(progress)
    page.moved()
    page.ended(is_finished=False)
    assert progress.phase is None and not list(tmp_path.iterdir())


@given(st.lists(st.integers(1, 40), max_size=60))
def test_a_curve_has_each_step_once_in_order_whatever_was_done_again(steps: list[int]):
    phase = Phase("training")
    for step in steps:
        phase.add_loss(step, float(step))
    assert all(before[0] < after[0] for before, after in pairwise(phase.losses))
    assert [step for step, _ in phase.losses][-1:] == steps[-1:]


def test_a_long_curve_is_thinned():
    phase = Phase("training")
    for step in range(1, 5 * MOST_LOSSES):
        phase.add_loss(step, 1.0)
        assert len(phase.losses) <= MOST_LOSSES
    assert phase.losses[0][0] == 1 and phase.losses[-1][0] > 5 * MOST_LOSSES - 20


def test_a_page_is_written_as_a_stage_begins_and_seldom_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock, written = Clock(), list[float]()
    progress = RunProgress(tmp_path, STAGES, clock)
    page = ProgressPage(progress, clock)
    monkeypatch.setattr(page, "_write", lambda: written.append(clock.now))
    for second in range(200):
        clock.now = float(second)
        progress(place(second // 100, STAGES), "training", second, 200)
        page.moved()
    starts = [float(second) for start in (0, 100) for second in range(start, start + 100, int(SECONDS))]
    assert written == starts


@pytest.fixture(scope="module")
def resumed(
    tiny_data: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Sequence[str]]:
    """A run that was stopped in its second stage and went on; its folder, and its page before and after."""
    recipe = tiny.recipe(tmp_path_factory.mktemp("followed") / "run", tiny_data, tiny_backbone)
    pages = []
    for stop in (True, False):
        progress = RunProgress(recipe.run, tiny.TASKS)
        page = ProgressPage(progress)

        def moved(*given, progress=progress, page=page, stop=stop) -> None:
            progress(*given)
            page.moved()
            if stop and given[:3] == (place(1, tiny.TASKS), "training", 4):
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            learn(recipe, moved)
        page.ended(is_finished=not stop)
        pages.append((recipe.run / "progress.html").read_text())
    return recipe.run, pages


class Shown(HTMLParser):
    """Tags and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if data.strip() and self.tags[-1][0] != "style":
            self.words.append(data)


def test_a_resumed_run_goes_on_with_what_it_has_shown(resumed: tuple[Path, Sequence[str]]):
    run, (stopped, finished) = resumed
    assert "stopped in stage 2 of 2" in Shown(stopped).words[0] and "finished" in Shown(finished).words[0]
    lines = [[tag["points"] for name, tag in Shown(text).tags if name == "polyline"] for text in (stopped, finished)]
    assert lines[0][0] == lines[1][0] and len(lines[0]) == len(lines[1]) == 3  # training; probing and training
    kept = json.loads((run / "progress.json").read_text())
    assert kept["state"] == "finished" and [stage["name"] for stage in kept["stages"]] == list(tiny.TASKS)
    matrix = read_results(run / "results.json").headline.matrix
    shown = [number(value) for row in matrix for value in row if value is not None]
    assert len(shown) == 3 and all(value in Shown(finished).words for value in shown)
    assert shown[0] in Shown(stopped).words


def test_who_is_followed_learns_the_same_bytes(resumed: tuple[Path, Sequence[str]], lesson_of: Callable[..., Lesson]):
    ours, theirs = (
        {path.relative_to(run): path.read_bytes() for path in run.glob("tasks/*/*.safetensors")}
        for run in (resumed[0], lesson_of("cmoe").recipe.run)
    )
    assert ours == theirs and len(ours) >= 6


@pytest.mark.parametrize("words", [("eval",), ("report",), ("compare",), ("answers", "export", "--to", "out")])
def test_a_run_that_shows_its_progress_is_verified_and_read_as_any(
    words: tuple[str, ...], resumed: tuple[Path, Sequence[str]], lesson_of: Callable[..., Lesson], tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command, *options = words
    if command == "answers":
        words = ("answers", "export", resumed[0], *options[1:])
    else:
        words = (command, resumed[0], *([lesson_of("cmoe").recipe.run] if command == "compare" else []))
    result = type_in(*words)
    assert result.exit_code == 0 and "progress" not in result.output, result.output


def hostile(word: str, run: Path, state: str) -> str:
    """A page in which whatever a run may say is `word`."""
    progress = RunProgress(run / re.sub(r"[/\0]", "", word), ("x", word or "y"))
    phases = [Phase(word, 1, 2, 3.0, [(1, 2.0), (2, 1.0)])]
    progress.course = Course([StageProgress(word, phases), StageProgress(word)], 0, state)  # type: ignore[arg-type]
    progress.phase = phases[0]
    return progress_page.progress_page(progress)


@given(st.text(st.sampled_from("<>/'\"&!-=` ascriptyle{}%;\n\u2028"), max_size=30))
@examples_of_hypothesis(max_examples=20)
def test_whatever_a_run_is_called_its_page_has_the_same_tags_and_runs_nothing(word: str):
    for state in ("running", "stopped", "finished"):
        found, plain = (Shown(hostile(one, Path("nowhere"), state)) for one in (word, "word"))
        assert [(tag, list(one)) for tag, one in found.tags] == [(tag, list(one)) for tag, one in plain.tags]
        policy = next(one["content"] for _, one in found.tags if one.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'; ") and "script-src" not in policy and "unsafe" not in policy
        refreshed = [one for _, one in found.tags if one.get("http-equiv") == "refresh"]
        assert len(refreshed) == (state == "running")
        assert not {"script", "img", "link", "iframe", "a", "form"} & {tag for tag, _ in found.tags}


BROKEN = {
    "cut": '{"stages":[{"na',
    "another run's": '{"stages":[{"name":"z","phases":[]}],"current":0,"state":"running"}',
    "beyond its end": '{"stages":[{"name":"a"},{"name":"b"},{"name":"c"}],"current":3}',
    "before its start": '{"stages":[{"name":"a"},{"name":"b"},{"name":"c"}],"current":-1}',
    "no number": '{"stages":[{"name":"a","phases":[{"name":"t","losses":[[1,NaN]]}]},{"name":"b"},{"name":"c"}]}',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=list(BROKEN))
def test_what_cannot_be_gone_on_with_is_named_and_begun_anew(text: str, tmp_path: Path, caplog):
    (tmp_path / "progress.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        progress = RunProgress(tmp_path, STAGES)
    assert progress.course == Course([StageProgress(name) for name in STAGES]) and not progress.was_kept
    assert [record.getMessage() for record in caplog.records if "progress.json" in record.getMessage()]


def test_a_page_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    progress = RunProgress(tmp_path / "run", STAGES)
    progress.run = tmp_path / "file"
    page = ProgressPage(progress)
    with caplog.at_level(logging.WARNING):
        for stage in range(3):
            progress(place(stage, STAGES), "training", 1, 1)
            page.moved()
        page.ended(is_finished=True)
    assert len(caplog.records) == 1 and "progress.html" in caplog.records[0].getMessage()


def test_who_is_refused_at_a_run_leaves_its_page_alone(tmp_path: Path):
    clock = Clock()
    first = RunProgress(tmp_path, STAGES, clock)
    page = ProgressPage(first)
    work(first, clock, 0, {"training": 1.0})
    page.moved()
    before = (tmp_path / "progress.html").read_bytes()
    ProgressPage(RunProgress(tmp_path, STAGES)).ended(is_finished=False)
    assert (tmp_path / "progress.html").read_bytes() == before
