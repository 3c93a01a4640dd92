"""What a run's record says changes nothing outside its folder for whoever opens it."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

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
