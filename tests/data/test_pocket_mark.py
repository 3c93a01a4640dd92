"""A pocket sequence of another version or seed is refused; what is no pocket sequence is not asked."""

from pathlib import Path

import pytest

from llava_cmoe.data.pocket_mark import NAME, check_pocket
from llava_cmoe.data.problems import DataError
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.pocket.root import make_pocket_root
from llava_cmoe.settings.data import DataSettings
from llava_cmoe.settings.recipes import parse_settings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rendered") / "pocket"
    make_pocket_root(root, lambda *_: None, seed=3, train_rows=2, test_rows=1)
    return root


def test_a_root_is_of_the_seed_it_was_rendered_with(root: Path):
    TaskData.open(DataSettings(root=root, pocket_seed=3), 0).check(reads_images=True)
    with pytest.raises(DataError, match="rendered from seed 3, not 0; set data.pocket_seed"):
        TaskData.open(DataSettings(root=root), 0).check(reads_images=True)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "[", '{"version": 1, "seed": 0}'])
def test_a_root_that_says_nothing_or_an_older_version_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / NAME).write_text(content)
    with pytest.raises(DataError, match="rendered by an older version, with other questions; delete it"):
        check_pocket(tmp_path, 0)


def test_a_run_older_than_the_setting_goes_on_with_its_data(root: Path):
    (root / NAME).rename(root / "aside")
    recorded = parse_settings(DataSettings, {"root": str(root)}, "an old run", recorded=True)
    TaskData.open(recorded, 0).check(reads_images=True)
