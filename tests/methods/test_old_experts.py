"""A task's routers may know only some old experts: what it stores and computes does not grow with the tasks before."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Lesson
from torch import Tensor

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.methods import probing
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.methods.pool_use import count
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.stage import stage_data


@pytest.fixture(scope="module", params=["most_used", "nearest_task"])
def lesson(
    request: pytest.FixtureRequest, tiny_data: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Lesson:
    """The first task has three experts a layer, of which the second one's routers may know one."""
    run = tmp_path_factory.mktemp("old") / "run"
    changes = ("method.experts.num_first=3", "method.probe.old_experts=1", "method.probe.near=1")
    return tiny.attend(
        tiny.recipe(run, tiny_data, tiny_backbone, "cmoe", *changes, f"method.probe.init={request.param}")
    )


def test_routers_know_the_new_experts_and_so_many_old_ones_and_come_back_so(lesson: Lesson):
    method = restore_method(lesson.recipe, load_backbone(lesson.recipe.backbone), Registry(lesson.recipe.run))
    assert isinstance(method, Cmoe)
    for bank in method.host.banks.values():
        old, *new = bank.router.known[1]
        assert old < 3 and tuple(new) == bank.ids[3:]
        assert len(bank.router.weight(1)) == 1 + len(new)
    for task, logits in enumerate(lesson.logits[1]):
        assert torch.equal(lesson.logits_of(method, task), logits)
    assert torch.equal(lesson.logits[0][0], lesson.logits[1][0])


def test_what_is_known_is_what_the_tasks_rows_use_most(lesson: Lesson, monkeypatch: pytest.MonkeyPatch):
    method = restore_method(lesson.recipe, load_backbone(lesson.recipe.backbone), Registry(lesson.recipe.run), stages=1)
    assert isinstance(method, Cmoe)
    counted: list[dict[str, Tensor]] = []

    def counting(*args: Any) -> dict[str, Tensor]:
        counted.append(count(*args))
        return counted[-1]

    monkeypatch.setattr(probing, "count", counting)
    data = stage_data(lesson.run, 1, lesson.run.stages[1])
    growth, init = method.probe(data, lambda *args, **kwargs: None)
    # by the probes' routers, then by the nearest task's
    assert len(counted) == (1 if growth.nearest is None else 2)
    for site, begin in init.items():
        pool = counted[-1][site][:3].tolist()
        assert begin.known == (pool.index(max(pool)),)
