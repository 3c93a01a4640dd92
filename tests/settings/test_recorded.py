"""What a run's record says changes nothing outside its folder for whoever opens it."""

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.backbones import loading
from llava_cmoe.backbones.loading import BackboneError, load_backbone, reads_images
from llava_cmoe.settings.recipes import parse_recipe


@given(st.text("ab ./~é", min_size=1).filter(str.strip), st.integers(0, 16), st.sampled_from(["wandb", "mlflow"]))
def test_a_record_chooses_no_folder_no_processes_and_no_service(folder: str, workers: int, service: str):
    document = {
        "run": "run",
        "method": {"name": "cmoe"},
        "data": {"feature_store": folder, "workers": workers, "root": "mine"},
        "training": {"report_to": [service], "epochs": 3},
    }
    recipe = parse_recipe(document, "run.json", recorded=True)
    assert (recipe.data.feature_store, recipe.data.workers, recipe.training.report_to) == (None, 0, None)
    assert (recipe.data.root, recipe.training.epochs) == (Path("mine"), 3)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("opened", [load_backbone, reads_images])
def test_a_model_that_only_a_record_names_is_not_fetched(monkeypatch: pytest.MonkeyPatch, opened, recorded: bool):
    asked = list[bool]()

    def fetched(path: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(not local_files_only)
        raise LocalEntryNotFoundError(path)

    monkeypatch.setattr(loading, "snapshot_download", fetched)
    document = {"run": "run", "method": {"name": "cmoe"}, "backbone": {"path": "someone/model"}}
    recipe = parse_recipe(document, "run.json", recorded=recorded)
    with pytest.raises(BackboneError, match="hf download someone/model" if recorded else "give the folder"):
        opened(recipe.backbone)
    assert asked == [not recorded]
