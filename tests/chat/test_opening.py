"""Runs opened together: one backbone, and each computes what it computed when it was learned."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from tiny import Lesson

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.chat import opening
from llava_cmoe.chat.opening import Snapshot, open_together
from llava_cmoe.sequence import learn
from llava_cmoe.settings.base import RecipeError

LEARNED = ("cmoe", "sequential_lora", "moelora")
"""One with banks and a locator, one of PEFT's, one with banks that all tasks train."""


def test_runs_opened_together_share_the_backbone_and_compute_what_they_did(lesson_of: Callable[..., Lesson]):
    wanted = [(lesson_of(method), after) for method in LEARNED for after in (2, 1)]
    opened = open_together([Snapshot(lesson.recipe.run, after) for lesson, after in wanted])
    weights = [tiny.backbone_weights(learned.method.model) for learned in opened]
    for name in load_backbone(wanted[0][0].recipe.backbone).model.state_dict():
        assert len({one[name].data_ptr() for one in weights}) == 1, name
    for (lesson, after), learned in zip(wanted, opened, strict=True):
        assert tuple(learned.names) == tiny.TASKS[:after]
        for task, logits in enumerate(lesson.logits[after - 1]):
            assert torch.equal(lesson.logits_of(learned.method, task), logits)


@pytest.mark.parametrize("change", ["settings", "files"])
def test_a_run_on_another_backbone_is_refused_before_one_is_loaded(
    change: str, lesson_of: Callable[..., Lesson], tiny_data: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch
):
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, backbone)
    if change == "files":
        (backbone / "generation_config.json").write_text(json.dumps({"transformers_version": "0"}))
    changed = ["backbone.dtype=bfloat16"] if change == "settings" else []
    words = ("data.train_rows=4", "data.eval_rows=2", "evaluation.routes=[oracle]", *changed)
    other = tiny.recipe(tmp_path / "run", tiny_data, backbone, "sequential_lora", *words)
    learn(other)
    monkeypatch.setattr(opening, "load_backbone", lambda _: pytest.fail("loaded"))
    named = "backbone.dtype" if change == "settings" else "the files of backbone.path"
    with pytest.raises(RecipeError, match=named):
        open_together([Snapshot(lesson_of("cmoe").recipe.run), Snapshot(other.run)])
