"""Whoever opens a run folder neither reads nor writes where a link in it leads."""

from pathlib import Path

import pytest
from commands import refused
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.evaluation.rescoring import results_of
from llava_cmoe.registry.inside import check_inside
from llava_cmoe.registry.run_lock import hold
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry

PLACES = ("run.json", "results.json", ".lock", "matrix.png", "tasks", "tasks/01_a", "tasks/01_a/experts.safetensors")
PLACES += ("answers/after_01", "merges", "merges/.next.partial", "subsets/5_0", "trainer/01_a", "manifest.json")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["../outside", "../missing", "/etc"])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, place: str, target: str):
    (tmp_path / "outside").mkdir()
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(target if target == "/etc" else tmp_path / target.removeprefix("../"))
    for opened in (Registry, results_of, hold):
        with pytest.raises(RegistryError, match="is a link to .* outside the run folder"):
            opened(tmp_path / "run")
    for command in () if target == "/etc" else ("eval", "chat", "report", "rescore", "merge", "probe"):
        assert "outside the run folder" in refused(command, tmp_path / "run")
    assert list((tmp_path / "outside").iterdir()) == []


@given(st.lists(st.sampled_from(["..", "inner", "x"]), max_size=4))
def test_a_link_is_judged_by_where_it_ends(tmp_path_factory: pytest.TempPathFactory, parts: list[str]):
    run = tmp_path_factory.mktemp("link") / "run"
    (run / "inner").mkdir(parents=True)
    (run / "inner" / "link").symlink_to("/".join(parts) or ".")
    ends = (run / "inner" / "link").resolve()
    if ends.is_relative_to(run.resolve()):
        check_inside(run)
    else:
        with pytest.raises(RegistryError):
            check_inside(run)


def test_a_run_folder_may_itself_be_reached_by_a_link(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    check_inside(tmp_path / "link")
