import pytest
import torch

from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.records import Located


def test_a_plan_knows_its_newest_task_and_gives_no_weight_to_no_task() -> None:
    plan = RoutePlan.of(Located.at(torch.tensor([2, -1, 0], dtype=torch.int32)))
    assert plan.max_task == 2 and plan.distinct == (-1, 0, 2)
    assert plan.tasks_BK.tolist() == [[2], [-1], [0]]
    assert plan.weights_BK.tolist() == [[1.0], [0.0], [1.0]]
    assert RoutePlan.single(-1).weights_BK.item() == 0 and RoutePlan.single(3).max_task == 3


@pytest.mark.parametrize("task", [-1, 0, 4])
@pytest.mark.parametrize("num", [1, 2, 16])
def test_a_batch_whose_samples_all_belong_to_one_task_is_planned_as_one(task: int, num: int) -> None:
    plan, one = RoutePlan.of(Located.at(torch.full((num,), task))), RoutePlan.single(task)
    assert torch.equal(plan.tasks_BK, one.tasks_BK) and torch.equal(plan.weights_BK, one.weights_BK)
    assert plan.distinct == one.distinct == (task,)


def test_a_plan_of_several_tasks_a_sample_is_as_it_was_located() -> None:
    located = Located(torch.tensor([[0, 3], [-1, -1]]), torch.tensor([[0.75, 0.25], [0.0, 0.0]]))
    plan = RoutePlan.of(located)
    assert plan.max_task == 3 and plan.tasks_BK is located.tasks_BK and plan.weights_BK is located.weights_BK


def test_a_plan_that_moves_takes_along_what_routers_decided() -> None:
    plan = RoutePlan.single(0)
    moved = plan.to(torch.device("meta"))
    assert {moved.tasks_BK.device.type, moved.weights_BK.device.type} == {"meta"} and moved.max_task == 0
    plan.decided["site"] = torch.ones(1)
    assert moved.decided is plan.decided


def test_a_plan_of_unequal_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(2,\)"):
        RoutePlan(torch.zeros(2, 1, dtype=torch.long), torch.ones(2), (0,))
