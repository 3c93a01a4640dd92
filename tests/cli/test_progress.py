import io
from pathlib import Path

from rich.console import Console

from llava_cmoe.cli.progress import ProgressLine, RunLine, StudyLine, clock
from llava_cmoe.runs.progress import RunProgress
from llava_cmoe.runs.progress_page import ProgressPage


def shown(terminal: bool, broken: bool = False) -> str:
    """What is left on the screen after two stages, the first of two parts."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    try:
        with ProgressLine(console) as line:
            for where, what in (("1/2 gqa", "training"), ("1/2 gqa", "gqa (located)"), ("2/2 vqa", "training")):
                for done in (1, 2, 3):
                    line(where, what, done, 3)
            if broken:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    return stream.getvalue()


def test_without_a_terminal_every_finished_part_is_one_line():
    assert shown(terminal=False).splitlines() == [
        "1/2 gqa: training, 0:00",
        "1/2 gqa: gqa (located), 0:00",
        "2/2 vqa: training, 0:00",
    ]


def test_in_a_terminal_a_finished_stage_leaves_one_line():
    lines = [line for line in shown(terminal=True).splitlines() if "done in" in line]
    assert [line[line.index("/") - 1 :] for line in lines] == ["1/2 gqa: done in 0:00", "2/2 vqa: done in 0:00"]


def test_a_stage_that_broke_off_is_not_called_done():
    assert shown(terminal=True, broken=True).count("done in") == 1


def test_a_run_that_learns_shows_its_loss_and_what_is_left_and_leaves_a_page(tmp_path: Path):
    stream, progress = io.StringIO(), RunProgress(tmp_path, ("gqa", "[b]vqa"))
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with RunLine(console, progress, ProgressPage(progress)) as line:
        for where in ("1/2 gqa", "2/2 [b]vqa"):
            for step in (1, 2):
                line(where, "training", step, 2, 0.5 / step)
                line._live.refresh()
            line(where, "gqa (located)", 1, 1)
    said = stream.getvalue()
    assert "training, loss 0.250" in said and "left: phase 0:00" in said and "left: stage 0:00, all 0:00" in said
    assert "2/2 [b]vqa: done in 0:00" in said and "finished" in (tmp_path / "progress.html").read_text()


def test_brackets_in_names_are_shown_as_they_are():
    stream = io.StringIO()
    with ProgressLine(Console(file=stream, force_terminal=False)) as line:
        line("[bold]a[/bold]", "[red]b", 1, 1)
    assert stream.getvalue() == "[bold]a[/bold]: [red]b, 0:00\n"


def test_times_are_read_as_a_clock():
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3600)] == ["0:00", "1:00", "1:01", "1:00:00"]


def test_each_run_of_a_study_leaves_a_line_and_a_failure_its_reason():
    for terminal in (False, True):
        stream = io.StringIO()
        with StudyLine(Console(file=stream, force_terminal=terminal, width=100, color_system=None), total=3) as line:
            line.moved(0.4, ["rank/rank_4_0", "rank/rank_[b]_0"])
            line.ended("rank/rank_4_0", 61.0, None)
            line.ended("rank/rank_[b]_0", 2.0, "status 1; x.log ends:\n  [red] light")
            line.moved(2.0, ["rank/rank_8_0"])
        lines = [line.replace("\x1b[2K", "").strip() for line in stream.getvalue().splitlines()]
        after = ["rank/rank_4_0: learned after 1:01", "rank/rank_[b]_0: failed after 0:02"]
        assert [found for found in lines if "after" in found] == after
        assert [found for found in lines if "red" in found] == ["[red] light"]
        assert any("2/3 runs" in found and "rank/rank_8_0" in found for found in lines) == terminal


def test_the_time_left_of_a_study_is_told_from_all_it_has_done(monkeypatch):
    now, stream = [0.0], io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    console.get_time = lambda: now[0]
    with StudyLine(console, total=4) as line:
        for minutes, done in ((0, 1.0), (10, 1.5), (30, 2.5)):
            now[0] = 60.0 * minutes
            line.moved(done, ["a"])
    assert "0:30:00" in stream.getvalue()  # 1.5 runs in half an hour, 1.5 to go
