"""Probing a finished run tells where tasks would grow, and leaves the run as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import refused, type_in
from tiny import Lesson, files_of

from llava_cmoe.analyses.probe_report import Probed, ProbeReport, agreement_of, probe_tasks, render
from llava_cmoe.records import Growth
from llava_cmoe.settings.methods.cmoe import ProbeSettings


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("cmoe")


def test_probing_tells_the_growth_that_learning_the_next_task_began_with_and_writes_nothing(lesson: Lesson):
    before = files_of(lesson.recipe.run)
    kept = lesson.recipe.training.model_copy(update={"checkpoint_steps": 5})
    learned, following = probe_tasks(lesson.recipe.model_copy(update={"training": kept}), after=1).tasks
    assert files_of(lesson.recipe.run) == before
    assert (learned.learned, following.learned) == (True, False)
    recorded = lesson.run.registry.records()[1].facts["growth"]
    assert following.growth.new_experts == recorded["new_experts"]
    assert {site: list(used) for site, used in following.growth.frequencies.items()} == recorded["frequencies"]


def test_the_command_shows_every_task_and_writes_what_it_shows(lesson: Lesson, tmp_path: Path):
    out = tmp_path / "probed.json"
    result = type_in(
        "probe", lesson.recipe.run, "method.probe.alpha=0", "method.probe.scope=layer", "--after", "1", "--out", out
    )
    assert result.exit_code == 0, result.output
    written = ProbeReport.model_validate_json(out.read_bytes())
    assert (written.base, written.after, written.probe.scope) == (lesson.results.base, 1, "layer")
    assert written.recipe["method"]["probe"]["scope"] == "global"  # how the run itself was probed
    assert [one.task for one in written.tasks] == list(lesson.results.tasks)
    for one in written.tasks:
        assert f"{len(one.growth.new_experts)} of 2" in result.output
        for site, used in one.growth.frequencies.items():
            mean = sum(used) / len(used)  # alpha 0: the threshold is the mean
            assert one.growth.thresholds[site] == pytest.approx(mean)


def test_probing_from_several_seeds_reports_how_far_they_agree(lesson: Lesson, tmp_path: Path):
    out, before = tmp_path / "probed.json", {*lesson.recipe.run.rglob("*")}
    result = type_in("probe", lesson.recipe.run, "--after", "1", "--seeds", "3", "--out", out)
    assert result.exit_code == 0, result.output
    assert {*lesson.recipe.run.rglob("*")} == before  # no file and no folder
    written = ProbeReport.model_validate_json(out.read_bytes())
    assert written.seeds == 3 and "all pairs of 3 seeds" in result.output
    once = probe_tasks(lesson.recipe, after=1)
    for several, one in zip(written.tasks, once.tasks, strict=True):  # the first seed is learning's
        assert several.growth.frequencies == one.growth.frequencies
        assert several.growth.new_experts == one.growth.new_experts
    assert all(one.agreement is None for one in once.tasks)
    for one in written.tasks:
        assert one.agreement is not None
        assert 0 <= one.agreement.layers <= 100 and 0 <= one.agreement.copied <= 100 and one.agreement.chance == 50


def test_agreement_is_over_all_pairs_of_seeds():
    def grown(layers: set[str], most_used: int) -> Growth:
        used = tuple(0.5 if expert == most_used else 0.1 for expert in range(4))
        return Growth(dict.fromkeys(layers, 1), frequencies={"a": (*used, 0.2), "b": (*used, 0.2)})

    found = [grown({"a", "b"}, 0), grown({"a"}, 0), grown(set(), 3)]
    agreement = agreement_of(found, ProbeSettings())
    assert agreement.layers == pytest.approx(100 * (1 / 2 + 0 + 0) / 3)
    assert agreement.copied == pytest.approx(100 / 3) and agreement.chance == 25
    assert agreement_of([grown(set(), 0), grown(set(), 0)], ProbeSettings()).layers == 100


def test_a_site_that_no_counted_row_reached_has_no_number(lesson: Lesson):
    low, projector = "model.layers.0.mlp", "model.multi_modal_projector"
    tasks = (
        Probed("text only", True, {low: 0.25}, Growth({})),
        Probed("pictures", False, {projector: 0.5, low: 0.75}, Growth({projector: 1})),
    )
    table = render(probe_tasks(lesson.recipe, after=1).model_copy(update={"tasks": tasks}))
    shown = {str(column.header): list(column.cells) for column in table.columns}
    assert shown["layer 0"] == ["25", "75"] and shown["projector"] == ["", "[bold]50"]
    assert shown["would grow"] == ["0 of 2", "1 of 2"]


def test_what_cannot_be_probed_is_refused(lesson: Lesson, lesson_of: Callable[[str], Lesson]):
    assert "2 stages are learned, not 3; name 1 to 2" in refused("probe", lesson.recipe.run, "--after", "3")
    assert "does not probe" in refused("probe", lesson_of("sequential_lora").recipe.run)
    assert "did you mean method.probe?" in refused("probe", lesson.recipe.run, "method.prob.alpha=0")
