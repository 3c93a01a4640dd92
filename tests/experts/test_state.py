from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from banks import GivenGate, add_task, train_task
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_cmoe.backbones.sites import ffn_sites
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.state import TaskState, restore, state_of
from llava_cmoe.experts.surgery import ExpertHost, install, uninstall

UP = "model.language_model.layers.1.mlp/up_proj"
ROUTER = "model.language_model.layers.1.mlp/router"


@dataclass(frozen=True)
class Learned:
    """Banks that learned some tasks, and what each of these trained."""

    host: ExpertHost
    states: list[TaskState]


@pytest.fixture
def learned(host: ExpertHost, generator: torch.Generator) -> Learned:
    """Three tasks; the first layer gets its first expert with the second task, the second layer grows unevenly."""
    states = []
    for task, numbers in enumerate(((0, 2), (1, 0), (2, 1))):
        for bank, num_new in zip(host.banks.values(), numbers, strict=True):
            train_task(bank, num_new, generator)
        states.append(state_of(host.banks, task))
        host.freeze()
    return Learned(host, states)


def test_a_model_restored_from_files_has_the_same_bits_for_every_task(
    tiny_llava: LlavaForConditionalGeneration, learned: Learned, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    for task, state in enumerate(learned.states):
        save_file(dict(state.experts), tmp_path / f"experts{task}")
        save_file(dict(state.routers), tmp_path / f"routers{task}")

    def answers(host: ExpertHost, num_tasks: int) -> list[Tensor]:
        results = []
        for task in range(num_tasks):
            with torch.no_grad(), host.context.use(RoutePlan.single(task)):
                results.append(model(**batch).logits)
        return results

    model = tiny_llava
    expected = answers(learned.host, 3)
    for num_tasks in (2, 3):  # as it was after that task
        uninstall(model)
        host = install(model, ffn_sites(model), lambda width: TaskRouters(width, top_k=2), rank=3, alpha=6.0)
        for task in range(num_tasks):
            state = TaskState(load_file(tmp_path / f"experts{task}"), load_file(tmp_path / f"routers{task}"))
            restore(host.banks, state)
            host.freeze()
        for restored, original in zip(answers(host, num_tasks), expected[:num_tasks], strict=True):
            assert torch.equal(restored, original)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_state_holds_what_its_task_trained_under_readable_names(learned: Learned) -> None:
    first, second, third = learned.states
    assert {name: tuple(tensor.shape) for name, tensor in first.experts.items() if name.startswith(UP)} == {
        f"{UP}.A": (2, 3, 32),
        f"{UP}.B": (2, 64, 3),
    }
    assert first.routers.keys() == {ROUTER} and first.routers[ROUTER].shape == (2, 32)
    assert not any(name.startswith(UP) for name in second.experts) and second.routers[ROUTER].shape == (2, 32)
    assert third.experts[f"{UP}.A"].shape == (1, 3, 32) and third.routers[ROUTER].shape == (3, 32)


def test_a_state_holds_no_expert_of_another_task(learned: Learned) -> None:
    for task, state in enumerate(learned.states):
        frozen = state_of(learned.host.banks, task)  # too late for the experts: nothing is trainable any more
        assert not frozen.experts and frozen.routers.keys() == state.routers.keys()
        assert all(torch.equal(frozen.routers[name], state.routers[name]) for name in state.routers)


def test_a_state_is_a_copy(host: ExpertHost, generator: torch.Generator) -> None:
    for bank in host.banks.values():
        train_task(bank, 2, generator)
    state = state_of(host.banks, 0)
    before = deepcopy(state)
    for bank in host.banks.values():
        for parameter in bank.parameters():
            parameter.data.zero_()
    assert all(torch.equal(state.experts[name], before.experts[name]) for name in state.experts)
    assert torch.equal(state.routers[ROUTER], before.routers[ROUTER]) and state.routers[ROUTER].any()
    assert state.experts[f"{UP}.A"].any() and state.experts[f"{UP}.B"].any()


def test_a_restored_task_goes_on_learning_until_it_is_frozen(host: ExpertHost, generator: torch.Generator) -> None:
    for bank in host.banks.values():
        train_task(bank, 2, generator)
    state = state_of(host.banks, 0)
    host.freeze()
    restore(host.banks, TaskState({}, dict(state.routers)))  # a task that only has a new router
    assert all(bank.router.task_1.requires_grad for bank in host.banks.values())
    host.discard_trainable()
    assert all(len(bank.router) == 1 for bank in host.banks.values())


def test_tensors_that_do_not_fit_are_named_and_nothing_is_added(learned: Learned, generator: torch.Generator) -> None:
    host = learned.host
    for bank in host.banks.values():
        add_task(bank, 1, generator)
    good = state_of(host.banks, 3)
    host.discard_trainable()
    without = {name: tensor for name, tensor in good.experts.items() if name != f"{UP}.B"}
    narrow = dict(good.experts) | {f"{UP}.A": torch.zeros(1, 2, 32)}
    numbered = dict(good.experts) | {f"{UP.partition('/')[0]}/ids": torch.tensor([1])}
    mistakes = {
        rf"{UP}\.B: missing": replace(good, experts=without),
        rf"{UP}\.A: shape \(1, 2, 32\), this site needs \(1, 3, 32\)": replace(good, experts=narrow),
        r"/router: missing": replace(good, routers={}),
        r"/router: shape \(1, 32\), this site needs \(4, 32\)": learned.states[1],
        r"elsewhere/router: no such linear": replace(
            good, routers={**good.routers, "elsewhere/router": torch.zeros(1)}
        ),
        r"/ids: experts \[1\] are there already": replace(good, experts=numbered),
    }
    for message, wrong in mistakes.items():
        with pytest.raises(ValueError, match=message):
            restore(host.banks, wrong)
        assert all(len(bank.router) == 3 for bank in host.banks.values())
        assert [bank.num_experts for bank in host.banks.values()] == [3, 3]
    restore(host.banks, good)
    assert [bank.num_experts for bank in host.banks.values()] == [4, 4]


@pytest.mark.parametrize(
    ("tasks", "saved"),
    [
        (((0,), (1, 2)), (False, False)),  # each follows the ones before
        (((1,), (3, 4)), (True, True)),
        (((2,), (0, 5), (3,)), (True, True, True)),
        (((0, 1), (), (2,)), (False, False, False)),
        (((0,), (2,), (3,)), (False, True, False)),
    ],
)
def test_experts_come_back_with_their_ids_which_are_saved_where_they_do_not_simply_follow(
    tiny_llava: LlavaForConditionalGeneration, tasks: tuple[tuple[int, ...], ...], saved: tuple[bool, ...]
) -> None:
    site = ffn_sites(tiny_llava)[0]

    def fresh() -> ExpertHost:
        return install(tiny_llava, [site], GivenGate, rank=3, alpha=6.0)

    host, states = fresh(), []
    for ids in tasks:
        for expert in ids:
            host.banks[site.name].grow(1, generator=torch.Generator().manual_seed(expert), first=expert)
        states.append(state_of(host.banks, len(states)))
        host.freeze()
    assert tuple(f"{site.name}/ids" in state.experts for state in states) == saved
    bank = host.banks[site.name]
    wanted = {expert: bank.expert(place) for place, expert in enumerate(bank.ids)}
    uninstall(tiny_llava)
    host = fresh()
    bank, so_far = host.banks[site.name], []
    for ids, state in zip(tasks, states, strict=True):
        restore(host.banks, state)
        so_far += ids
        assert (bank.ids, bank.trainable_ids) == (tuple(sorted(so_far)), ids)
        host.freeze()
    for place, expert in enumerate(bank.ids):
        for key, pair in bank.expert(place).items():
            assert torch.equal(pair.a_ERI, wanted[expert][key].a_ERI)
