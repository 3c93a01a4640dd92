"""What a run consists of: only names of its parts, none of which leads out of the folder or holds code."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cmoe.registry.contents import parts_among

STRANGE = ["../../escape.json", "tasks/01_a/model.pkl", "tasks/01_a/x.safetensors/../../../y.safetensors", "setup.py"]


@settings(max_examples=50)
@given(st.lists(st.one_of(st.sampled_from(STRANGE), st.text(max_size=30)), max_size=6))
def test_only_parts_of_a_run_are_taken(names: list[str]):
    for part in parts_among(
        [*names, *(f"tasks/01_a/{name}" for name in names), *(f"answers/{name}" for name in names)]
    ):
        assert part.endswith((".json", ".safetensors", ".jsonl"))
        assert ".." not in part.split("/") and not part.startswith("/") and len(part.split("/")) <= 5
