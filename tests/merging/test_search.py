"""A merge leaves a run as it was, keeps its bound, and can be answered with or taken back."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from commands import refused, type_in
from tiny import Lesson, files_of

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.data.task_data import held_out_rows, subsample
from llava_cmoe.merging import search
from llava_cmoe.merging.redundancy import Redundancy
from llava_cmoe.merging.search import losses, merge_run, merged, open_subject
from llava_cmoe.merging.store import Merges, restore_merge
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.run import Recipe

HELD_OUT = "data.train_rows=18"


@pytest.fixture
def lesson(lesson_of: Callable[..., Lesson]) -> Lesson:
    return lesson_of("cmoe", HELD_OUT)


@pytest.fixture
def recipe(lesson: Lesson, tmp_path: Path) -> Recipe:
    """Of a copy of the run, to be merged."""
    shutil.copytree(lesson.recipe.run, tmp_path / "run")
    return lesson.recipe.model_copy(update={"run": tmp_path / "run"})


def test_what_is_held_out_and_what_is_learned_are_all_rows_and_share_none(lesson: Lesson):
    rows = lesson.run.eval_spec.rows["colours"]
    for count in (None, 0, 2, 6, 9):
        learned, left = ({row["id"] for row in part(rows, count, 3)} for part in (subsample, held_out_rows))
        assert not learned & left and learned | left == set(rows["id"])


def test_no_bound_leaves_out_whatever_a_site_can_and_changes_nothing_that_was_learned(recipe: Recipe):
    before = files_of(recipe.run)
    record, folder = merge_run(recipe, bound=1e9, num_rows=4)
    after = files_of(recipe.run)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("merges/01/") for name in after.keys() - before.keys())
    kept = [sum(s == e for e, s in enumerate(of_E)) for of_E in record.stand_ins.values()]
    assert kept == [1, 1]
    share = sum(kept) / sum(map(len, record.stand_ins.values()))
    assert record.expert_bytes.after == pytest.approx(share * record.expert_bytes.before)
    assert record.held_out == {"colours": 4, "sides": 4}
    assert Merges(Registry(recipe.run)).load(1) == record and folder.name == "01"


def test_every_task_stays_within_the_bound_and_what_can_go_before_the_first_that_cannot_goes(recipe: Recipe):
    subject = open_subject(recipe, 6)
    redundancy = Redundancy(subject.method.host)
    with redundancy.watch():
        before = losses(subject, lambda *_: None)
    steps = tuple(redundancy.steps())
    rises = []
    for number in range(len(steps) + 1):
        with merged(subject, steps[:number]):
            after = losses(subject, lambda *_: None)
        rises.append(max(after[name] - before[name] for name in before))
    assert rises[0] == 0
    bound = sorted(rises)[len(rises) // 2]
    record, _ = merge_run(recipe, bound=bound, num_rows=6)
    assert all(record.loss[name].after <= record.loss[name].before + bound for name in before)
    assert record.loss["sides"].before == pytest.approx(before["sides"])
    num_out = sum(s != e for of_E in record.stand_ins.values() for e, s in enumerate(of_E))
    assert num_out >= next(number for number, rise in enumerate([*rises[1:], float("inf")]) if rise > bound)


def test_a_step_that_cannot_be_borne_is_passed_over_and_those_behind_it_are_taken(recipe: Recipe, monkeypatch):
    """Tasks that bear everything but the second and the fifth step."""
    unbearable, tried = {1, 4}, list[int]()

    def merged(subject, steps):
        tried[:] = steps
        return nullcontext()

    monkeypatch.setattr(search, "merged", merged)
    monkeypatch.setattr(search, "losses", lambda *_: {"colours": float(bool(unbearable & {*tried}))})
    taken, after = search.largest_feasible(None, range(30), {"colours": 0.0}, 0.5, lambda *_: None)
    assert set(taken) == set(range(30)) - unbearable and after == {"colours": 0.0}
    unbearable = set(range(3, 30))
    taken, _ = search.largest_feasible(None, range(30), {"colours": 0.0}, 0.5, lambda *_: None)
    assert taken == (0, 1, 2) and tried == [0, 1, 2, 3 + search.PATIENCE - 1]


def test_a_restored_merge_answers_as_it_was_measured_until_the_run_learns_on(lesson: Lesson, recipe: Recipe):
    merge_run(recipe, bound=1e9, num_rows=4)
    registry = Registry(recipe.run)
    method = restore_method(recipe, load_backbone(recipe.backbone), registry)
    restore_merge(method, registry, 1)
    assert not torch.equal(lesson.logits_of(method, 1), lesson.logits[-1][1])
    shutil.rmtree(recipe.run / "tasks/02_sides", ignore_errors=True)
    assert "for other learned tasks" in refused(
        "chat", recipe.run, "--merge", 1, "--image", next(lesson.recipe.data.root.rglob("*.png"))
    )


def test_the_command_shows_what_is_saved_and_what_it_costs(recipe: Recipe):
    result = type_in("merge", recipe.run, "--bound", 1e9, "--rows", 3)
    assert result.exit_code == 0, result.output
    assert "experts stay" in result.output and "sides" in result.output and "merges/01" in result.output


def test_what_cannot_be_merged_is_refused(lesson_of: Callable[..., Lesson]):
    assert "none is held out" in refused("merge", lesson_of("cmoe").recipe.run)
    assert "no pool of experts" in refused("merge", lesson_of("sequential_lora").recipe.run)


def test_answers_of_a_merge_that_was_killed_do_not_count_for_the_next(recipe: Recipe):
    merge_run(recipe, bound=1e9, num_rows=4)
    answers = recipe.run / "merges/01/answers"
    leftover = recipe.run / "merges/.next.partial/answers"
    shutil.copytree(answers, leftover)
    for path in leftover.rglob("*.jsonl"):
        path.write_text(path.read_text().replace('"text": "', '"text": "wrong'))
    merge_run(recipe, bound=1e9, num_rows=4)
    assert files_of(recipe.run / "merges/02/answers").keys() == files_of(answers).keys()
    for path in answers.rglob("*.jsonl"):
        assert (recipe.run / "merges/02/answers" / path.relative_to(answers)).read_text() == path.read_text()


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(path.read_bytes() + b" "), lambda path: path.unlink()]
)
def test_answers_of_a_merge_that_were_changed_are_named(recipe: Recipe, damage: Callable[[Path], None]):
    merge_run(recipe, bound=1e9, num_rows=4)
    registry = Registry(recipe.run)
    answers = sorted((recipe.run / "merges/01/answers").rglob("*.jsonl"))
    assert {str(path.relative_to(recipe.run / "merges/01")) for path in answers} == {*Merges(registry).load(1).answers}
    damage(answers[-1])
    with pytest.raises(RegistryError, match=f"{answers[-1]}: is not what was answered"):
        Merges(registry).load(1)


def test_a_merge_without_its_record_is_named(recipe: Recipe):
    merge_run(recipe, bound=1e9, num_rows=4)
    path = recipe.run / "merges/01/merge.json"
    path.unlink()
    with pytest.raises(RegistryError, match=f"{path}: is missing"):
        Merges(Registry(recipe.run)).load(1)
